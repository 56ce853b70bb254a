"""A model that runs out of memory, fails and spoils its cache, as often as a schedule says.

NaN in a row stays until it is scrubbed or written over, and shows in whoever uses the row:
attention gives hidden positions the weight 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.backends import HistoryBackend

MARK = 1
"""A prompt that begins with it is NaN from the length on that its second token says."""
# Passes between two that fail: with the sampling behind it, one of them at least is a whole step.
_MIN_SOUND = 8


@dataclass(frozen=True, slots=True)
class Weather:
    """How likely a pass is to run out of memory, to fail, and what it takes."""

    out_of_memory: float = 0.0
    failure: float = 0.0
    has_nan: bool = False
    pass_s: float = 0.0


CALM = Weather()


class StormBackend(HistoryBackend):
    """Known answers, in a weather that may change at any time."""

    def __init__(self, *, max_num_seqs: int = 4, max_model_len: int = 64) -> None:
        super().__init__(max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self.weather = CALM
        self.rng = random.Random(0)
        self.num_faults = 0
        self._num_to_fail = 0
        self._num_sound = 0
        self._nan: defaultdict[int, set[int]] = defaultdict(set)

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        weather = self.weather
        if weather.pass_s:
            time.sleep(weather.pass_s)
        logits = super().forward(first_row, new_token_ids, past_lengths, logit_indices)
        self.calls.clear()
        indices = logit_indices or [[0]] * len(new_token_ids)
        at = 0
        for row, (ids, past) in enumerate(zip(new_token_ids, past_lengths, strict=True), first_row):
            self._write(row, past, len(ids))
            num_logits = len(indices[row - first_row])
            if self._nan[row]:
                logits[at : at + num_logits] = torch.nan
            at += num_logits
        # Behind the pass: its rows are written, and whoever uses them next must not notice.
        self.break_as_told()
        self._num_sound += 1
        return logits

    def break_as_told(self) -> None:
        """Raise as the weather says: out of memory once to three times in a row."""
        if self._num_to_fail == 0 and self.rng.random() < self.weather.out_of_memory:
            self._num_to_fail = self.rng.randint(1, 3)
        if self._num_to_fail:
            self._num_to_fail -= 1
            self.num_faults += 1
            raise torch.OutOfMemoryError("as told")
        # Three failed steps with none between them that succeeds end an engine, as they should.
        if self._num_sound > _MIN_SOUND and self.rng.random() < self.weather.failure:
            self._num_sound = 0
            self.num_faults += 1
            raise RuntimeError("a pass went wrong, as told")

    def _write(self, row: int, past: int, num_tokens: int) -> None:
        tokens = self.rows[row]
        is_spoiled = self.weather.has_nan and len(tokens) > 1 and tokens[0] == MARK
        for position in range(past, past + num_tokens):
            if is_spoiled and position >= tokens[1]:
                self._nan[row].add(position)
                self.num_faults += 1
            else:
                self._nan[row].discard(position)

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        super().copy_kv(source_row, target_row, length)
        hidden = {p for p in self._nan[target_row] if p >= length}
        self._nan[target_row] = {p for p in self._nan[source_row] if p < length} | hidden

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        super().write_kv(row, start, kv)
        stop = start + kv.numel()
        self._nan[row] = {p for p in self._nan[row] if not start <= p < stop}

    def scrub_kv(self, row: int, start: int = 0) -> None:
        self._nan[row] = {p for p in self._nan[row] if p < start}


def break_sampling(sample: Callable[..., Any], backend: StormBackend) -> Callable[..., Any]:
    """Return a sampler's `sample` that breaks in the same weather."""

    def breaking(*args: Any) -> Any:
        backend.break_as_told()
        return sample(*args)

    return breaking
