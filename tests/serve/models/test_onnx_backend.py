"""Steps of the ONNX backend, static ones too: all of it but the CUDA call itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from serve.models.onnx_backend import OnnxBackend, padded_sizes
from serve.models.onnx_session import (
    make_session,
)
from tests.support.models.tiny_graphs import VOCAB_SIZE

MAX_NUM_SEQS = 5
LIMITS = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 64}
VARIANTS = ("fp32", "int8", "float16")

Rows = list[list[int]]


@pytest.fixture(scope="module")
def load(graphs: Path) -> Callable[..., OnnxBackend]:
    """`load(variant, cuda_graphs=...)`: one backend each; tests overwrite each other's rows."""
    loaded: dict[tuple[str, bool], OnnxBackend] = {}

    def load(variant: str, cuda_graphs: bool = False) -> OnnxBackend:
        key = variant, cuda_graphs
        if key not in loaded:
            loaded[key] = OnnxBackend.load(
                graphs / variant, device="cpu", num_threads=1, cuda_graphs=cuda_graphs, **LIMITS
            )
        return loaded[key]

    return load


class RecordingSession:
    """A session that notes what each run was asked for."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.graph_ids: list[str] = []
        self.bindings: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions) -> None:
        self.graph_ids.append(options.get_run_config_entry("gpu_graph_id"))
        self.bindings.append(binding)
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def recorded(graphs: Path) -> tuple[OnnxBackend, RecordingSession]:
    """A backend with static steps, and what it asks of its session."""
    session = RecordingSession(make_session(graphs / "fp32" / "model.onnx", "cpu", 1))
    backend = OnnxBackend(
        session,  # type: ignore[arg-type]
        {"vocab_size": VOCAB_SIZE},
        device=torch.device("cpu"),
        precision="fp32",
        num_parameters=1,
        cuda_graphs=True,
        **LIMITS,
    )
    return backend, session


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


def decode(backend: OnnxBackend, rows: Rows) -> torch.Tensor:
    """Prefill all but each row's last token, then decode that one; return `(B, V)`."""
    for index, row in enumerate(rows):
        backend.forward(index, [row[:-1]], [0])
    last, pasts = [row[-1:] for row in rows], [len(row) - 1 for row in rows]
    return backend.forward(0, last, pasts).clone()


@pytest.mark.parametrize(
    ("row_multiple", "is_static", "expected"),
    [
        (1, False, (0, 1, 2, 3, 4, 5)),
        (1, True, (0, 1, 2, 4, 4, 5)),
        (2, False, (0, 2, 2, 4, 4, 6)),
        (4, False, (0, 4, 4, 4, 4, 6)),
        (8, False, (0, 2, 2, 4, 4, 6)),
    ],
)
def test_padded_sizes(row_multiple: int, is_static: bool, expected: tuple[int, ...]) -> None:
    assert padded_sizes(5, row_multiple, is_static) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_static_step_computes_what_an_ordinary_one_does(
    load: Callable[..., OnnxBackend], variant: str, num_rows: int
) -> None:
    rows = [text(3 + 11 * i, i) for i in range(num_rows)]
    ordinary = decode(load(variant), rows)
    static = decode(load(variant, cuda_graphs=True), rows)
    # A lone row, and rows of float16, are added up in another order.
    tolerance = 2e-2 if variant == "float16" else 1e-4
    torch.testing.assert_close(static, ordinary, rtol=0, atol=tolerance)


def test_static_step_beside_a_full_row_reaches_the_last_position(
    load: Callable[..., OnnxBackend],
) -> None:
    rows = [text(64, 1), text(2, 2), text(9, 3)]
    ordinary = decode(load("fp32"), rows)
    static = decode(load("fp32", cuda_graphs=True), rows)
    torch.testing.assert_close(static, ordinary, rtol=0, atol=1e-4)


def test_static_steps_of_one_size_keep_their_addresses(
    recorded: tuple[OnnxBackend, RecordingSession],
) -> None:
    backend, session = recorded
    first = backend.forward(0, [[1], [2], [3]], [4, 5, 6])
    again = backend.forward(0, [[1], [2], [3], [4]], [5, 6, 7, 4])
    assert session.bindings[0] is session.bindings[1]
    assert first.data_ptr() == again.data_ptr()


def test_captured_steps_carry_the_graph_of_their_size(
    recorded: tuple[OnnxBackend, RecordingSession],
) -> None:
    backend, session = recorded
    backend.forward(0, [[1]], [4])
    backend.prepare()
    backend.forward(0, [[1], [2], [3]], [4, 5, 6])
    backend.forward(0, [[1, 2]], [0])
    backend.forward(0, [[1, 2]], [3])
    assert session.graph_ids == ["-1", "1", "2", "4", "5", "4", "-1", "-1"]


def test_another_thread_runs_without_the_graphs(
    recorded: tuple[OnnxBackend, RecordingSession],
) -> None:
    backend, session = recorded
    backend.prepare()
    thread = threading.Thread(target=backend.forward, args=(0, [[1]], [4]))
    thread.start()
    thread.join()
    assert session.graph_ids[-1] == "-1"


def test_ordinary_backend_captures_nothing(load: Callable[..., OnnxBackend]) -> None:
    backend, rows = load("fp32"), [text(5), text(9, 1)]
    expected = decode(backend, rows)
    backend.prepare()
    assert torch.equal(decode(backend, rows), expected)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_decode_returns_the_logits_asked_for(
    load: Callable[..., OnnxBackend], cuda_graphs: bool
) -> None:
    backend = load("fp32", cuda_graphs)
    everything = backend.forward(0, [[1], [2], [3]], [4, 5, 6]).clone()
    picked = backend.forward(0, [[1], [2], [3]], [4, 5, 6], [[0], [], [0]])
    assert torch.equal(picked, everything[[0, 2]])


@pytest.mark.parametrize("past_length", [0, 6])
def test_prefill_without_wanted_logits_still_fills_the_cache(
    load: Callable[..., OnnxBackend], past_length: int
) -> None:
    backend, ids = load("fp32"), text(9)
    backend.forward(7, [ids], [0])
    expected = backend.read_kv(7, 0, 9)
    backend.write_kv(7, past_length, torch.zeros_like(expected[:, :, past_length:]))
    logits = backend.forward(7, [ids[past_length:]], [past_length], [[]])
    assert logits.shape == (0, VOCAB_SIZE)
    torch.testing.assert_close(backend.read_kv(7, 0, 9), expected, rtol=0, atol=1e-5)


def test_half_logits_arrive_as_float32(load: Callable[..., OnnxBackend]) -> None:
    rows = [text(5), text(9, 1), text(4, 2)]
    found, expected = decode(load("half_logits"), rows), decode(load("fp32"), rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("new_token_ids", "past_length"), [([7], 0), ([7], 3), ([7, 8], 3), ([7, 8, 9], 0)]
)
def test_row_behind_a_prompt_that_enters_stays_as_it_is(
    load: Callable[..., OnnxBackend], new_token_ids: list[int], past_length: int
) -> None:
    backend, row = load("fp32"), MAX_NUM_SEQS + 1
    backend.forward(row + 1, [text(6)], [0])
    before = backend.read_kv(row + 1, 0, 64)
    backend.forward(row, [new_token_ids], [past_length])
    assert torch.equal(backend.read_kv(row + 1, 0, 64), before)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_decode_pads_no_further_than_the_free_rows(
    load: Callable[..., OnnxBackend], cuda_graphs: bool
) -> None:
    backend, row = load("fp32", cuda_graphs), MAX_NUM_SEQS + 1
    backend.forward(row, [text(6)], [0])
    before = backend.read_kv(row, 0, 64)
    for num_rows in range(1, MAX_NUM_SEQS + 1):
        backend.forward(0, [[1]] * num_rows, [9] * num_rows)
    assert torch.equal(backend.read_kv(row, 0, 64), before)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("cuts", [[16], [1], [30], [7, 15, 22], [10, 11, 20]])
def test_prompt_in_chunks_has_the_bits_of_the_whole(
    load: Callable[..., OnnxBackend], variant: str, cuts: list[int]
) -> None:
    backend, ids, row = load(variant), text(31), MAX_NUM_SEQS + 1
    whole = backend.forward(row, [ids], [0]).clone()
    cache = backend.read_kv(row, 0, 31)
    for start, stop in zip([0, *cuts], [*cuts, 31], strict=True):
        logits = backend.forward(row, [ids[start:stop]], [start])
    assert torch.equal(logits, whole)
    assert torch.equal(backend.read_kv(row, 0, 31), cache)


def test_last_positions_are_those_of_the_mask_that_they_replace(graphs: Path) -> None:
    """The file's own graph, fed a mask by a plain session, agrees with the rewritten one."""
    path = graphs / "fp32" / "model.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 3  # `logit_rows` can be fed, it warns
    plain = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = [text(7, 1), text(4, 2)]
    ids = np.array([rows[0], rows[1] + [0] * 3])
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    past = {
        i.name: np.zeros((2, 2, 0, 32), np.float32)
        for i in plain.get_inputs()
        if i.name.startswith("past")
    }
    logits = plain.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0]
    backend = OnnxBackend.load(graphs / "fp32", device="cpu", **LIMITS)
    found = backend.forward(0, rows, [0, 0])
    expected = torch.from_numpy(np.stack([logits[0, 6], logits[1, 3]]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
