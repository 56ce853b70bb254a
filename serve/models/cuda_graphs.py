"""Decode steps of one shape each, captured as CUDA graphs and replayed.

A captured step reads and writes fixed addresses with fixed shapes, so that batches are padded to a
bucket, and keys to a multiple of `KEYS_PER_BUCKET`. The steps are told what to capture with, so
that all of this but the capture itself also runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve.models.backend import ModelInfo

KEYS_PER_BUCKET = 256

# (first_row, token ids (B,), positions (B,), number of keys) -> logits (B, V)
Step = Callable[[int, Tensor, Tensor, int], Tensor]
Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


class DecodeGraphs:
    """One token for each of the rows from 0 on; rows up to the bucket's size are overwritten.

    Graphs are captured when first needed, by `capture(step)`, which returns what replays `step`.
    """

    def __init__(
        self,
        step: Step,
        capture: Capture,
        info: ModelInfo,
        *,
        max_num_keys: int,
    ) -> None:
        device = torch.device(info.device)
        self._step, self._capture = step, capture
        self._max_num_seqs, self._max_num_keys = info.max_num_seqs, max_num_keys
        self._inputs = torch.zeros(2, info.max_num_seqs, dtype=torch.int64, device=device)
        self._logits = torch.empty(info.max_num_seqs, info.vocab_size, device=device)
        self._replays: dict[tuple[int, int], Replay] = {}

    def decode(self, token_ids: Sequence[int], past_lengths: Sequence[int]) -> Tensor:
        """Return next-token logits `(B, V)`, valid until the next call."""
        batch = len(token_ids)
        size = batch_bucket(batch, self._max_num_seqs)
        num_keys = key_bucket(max(past_lengths) + 1, self._max_num_keys)
        # Padding rows write their token over the first one of a free row.
        padding = [0] * (size - batch)
        inputs = torch.tensor([[*token_ids, *padding], [*past_lengths, *padding]])
        self._inputs[:, :size].copy_(inputs)
        self._replay(size, num_keys)()
        return self._logits[:batch]

    def _replay(self, size: int, num_keys: int) -> Replay:
        key = size, num_keys
        if key not in self._replays:
            self._replays[key] = self._capture(lambda: self._run(size, num_keys))
        return self._replays[key]

    def _run(self, size: int, num_keys: int) -> None:
        token_ids, positions = self._inputs[:, :size]
        self._logits[:size] = self._step(0, token_ids, positions, num_keys)


def batch_bucket(batch: int, max_num_seqs: int) -> int:
    """Return the power of two from `batch` on, at most `max_num_seqs`.

    >>> [batch_bucket(batch, 12) for batch in (1, 3, 8, 9)]
    [1, 4, 8, 12]
    """
    return min(1 << (batch - 1).bit_length(), max_num_seqs)


def key_bucket(num_keys: int, max_num_keys: int) -> int:
    """Return the multiple of `KEYS_PER_BUCKET` from `num_keys` on, at most `max_num_keys`.

    >>> [key_bucket(num_keys, 700) for num_keys in (1, 256, 257, 600)]
    [256, 256, 512, 700]
    """
    return min(-(-num_keys // KEYS_PER_BUCKET) * KEYS_PER_BUCKET, max_num_keys)


def cuda_capture(device: torch.device) -> Capture:
    """Return what captures steps on a device. Their graphs share one pool of memory.

    Only one of them runs at a time, and none needs what an earlier one left in the pool.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Replay) -> Replay:
        with torch.cuda.device(device):
            _warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # By default a call of another thread, the other model's, would spoil the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                step()
        return graph.replay

    return capture


def _warm_up(step: Replay) -> None:
    """Let libraries choose kernels and take their workspaces, which a capture does not allow."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
