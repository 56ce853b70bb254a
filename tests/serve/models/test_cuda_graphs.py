"""Everything but the capture itself, which needs a GPU: here a captured step is just run again."""

from __future__ import annotations

import pytest
import torch

from serve.models.backend import ModelInfo
from serve.models.cuda_graphs import DecodeGraphs, Replay, batch_bucket, key_bucket

INFO = ModelInfo("torch", "cpu", "float32", 1, 7, max_model_len=600, max_num_seqs=6)


class Recorder:
    """Logits that say what a step was given, and what was captured and run."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], list[int], int]] = []
        self.num_captured = 0

    def step(
        self, first_row: int, token_ids: torch.Tensor, positions: torch.Tensor, num_keys: int
    ) -> torch.Tensor:
        assert first_row == 0
        self.steps.append((token_ids.tolist(), positions.tolist(), num_keys))
        return (token_ids * 1000 + positions)[:, None].expand(-1, INFO.vocab_size).float()

    def capture(self, step: Replay) -> Replay:
        self.num_captured += 1
        return step

    def graphs(self) -> DecodeGraphs:
        return DecodeGraphs(self.step, self.capture, INFO, max_num_keys=608)


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_batch_goes_into_the_next_power_of_two(batch: int, expected: int) -> None:
    assert batch_bucket(batch, 6) == expected


@pytest.mark.parametrize(("num_keys", "expected"), [(1, 256), (256, 256), (257, 512), (513, 608)])
def test_keys_go_into_the_next_bucket(num_keys: int, expected: int) -> None:
    assert key_bucket(num_keys, 608) == expected


def test_padding_rows_take_token_zero_at_position_zero() -> None:
    recorder = Recorder()
    logits = recorder.graphs().decode([5, 6, 7], [10, 300, 20])
    assert recorder.steps == [([5, 6, 7, 0], [10, 300, 20, 0], 512)]
    assert logits.shape == (3, INFO.vocab_size)
    assert logits[:, 0].tolist() == [5010, 6300, 7020]


def test_padding_of_an_earlier_step_is_cleared() -> None:
    recorder = Recorder()
    graphs = recorder.graphs()
    graphs.decode([1, 2, 3, 4], [1, 2, 3, 4])
    graphs.decode([1, 2, 3], [2, 3, 4])
    assert recorder.steps[-1] == ([1, 2, 3, 0], [2, 3, 4, 0], 256)


def test_each_shape_is_captured_once() -> None:
    recorder = Recorder()
    graphs = recorder.graphs()
    for batch, past in [(1, 3), (1, 4), (3, 4), (4, 5), (1, 256), (1, 300)]:
        graphs.decode([9] * batch, [past] * batch)
    assert recorder.num_captured == 3
    assert len(recorder.steps) == 6
