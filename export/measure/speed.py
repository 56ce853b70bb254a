"""Tokens per second, side by side: every contender takes its turn in every round.

Greedy decoding of one sequence behind a prompt of `PROMPT_TOKENS`, host time and sampling included
for each. Machines are noisy: only the ratios within one call mean something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from export.measure.summary import Speed
from serve.models.backend import Backend

PROMPT_TOKENS = 64


Contender = Callable[[list[int], int], tuple[float, float]]
"""Takes a prompt and a number of tokens; returns the seconds of prefill and of decoding them."""


def race(
    contenders: Mapping[str, Contender], vocab_size: int, num_tokens: int, num_rounds: int
) -> dict[str, Speed]:
    """Run each contender once to warm up, then once per round, and return its medians."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(prompt, 4)
    for _ in range(num_rounds):
        for name, run in contenders.items():
            times[name].append(run(prompt, num_tokens))
    return {
        name: Speed(
            prefill_s=statistics.median(prefill_s for prefill_s, _ in runs),
            decode_tokens_per_s=num_tokens / statistics.median(decode_s for _, decode_s in runs),
        )
        for name, runs in times.items()
    }


def tandem_contender(backend: Backend) -> Contender:
    """Decode through one of Tandem's backends."""

    def run(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        started_s = time.perf_counter()
        token = int(backend.forward(0, [prompt], [0]).argmax())
        prefilled_s = time.perf_counter()
        for step in range(num_tokens):
            token = int(backend.forward(0, [[token]], [len(prompt) + step]).argmax())
        return prefilled_s - started_s, time.perf_counter() - prefilled_s

    return run


class _TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands over the prompt and then each token."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_contender(model: Any) -> Contender:
    """Decode through transformers' `generate`; prefill and decoding are told apart in one run.

    The difference of two runs would be negative where something stalls the shorter one.
    """

    @torch.inference_mode()
    def run(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        ids, clock = torch.tensor([prompt]), _TokenClock()
        started_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens + 1,
            max_new_tokens=num_tokens + 1,
            streamer=clock,
        )
        _, first_s, *_, last_s = clock.times_s
        return first_s - started_s, last_s - first_s

    return run
