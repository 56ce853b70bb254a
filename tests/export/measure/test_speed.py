from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from export.measure.speed import PROMPT_TOKENS, Contender, Speed, race, tandem_contender
from export.measure.speed import transformers_contender as over_transformers

STALL_S = 0.2


def contender(name: str, calls: list[Any], times: Sequence[tuple[float, float]]) -> Contender:
    """Note the call, and take the seconds that `times` gives, the warm-up first."""
    left = iter(times)

    def run(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        calls.append((name, tuple(prompt), num_tokens))
        return next(left)

    return run


def test_contenders_take_turns_behind_one_warm_up_each_with_one_prompt_of_64_tokens() -> None:
    calls: list[Any] = []
    contenders = {name: contender(name, calls, [(1.0, 1.0)] * 4) for name in "abc"}
    race(contenders, vocab_size=50, num_tokens=10, num_rounds=3)
    assert [name for name, _, _ in calls] == list("abc" * 4)
    assert [count for _, _, count in calls] == [4] * 3 + [10] * 9
    (prompt,) = {prompt for _, prompt, _ in calls}
    assert len(prompt) == PROMPT_TOKENS == 64
    assert all(0 <= token < 50 for token in prompt)


def test_speed_is_the_median_over_rounds_without_the_warm_up() -> None:
    times = [(99.0, 99.0), (0.1, 2.0), (0.3, 1.0), (9.0, 50.0)]
    result = race({"a": contender("a", [], times)}, vocab_size=50, num_tokens=10, num_rounds=3)
    assert result == {"a": Speed(prefill_s=0.3, decode_tokens_per_s=5.0)}


class CountingBackend:
    """Says that the next token is one more than the last."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[list[int]], list[int]]] = []

    def forward(self, row: int, new: list[list[int]], past: list[int]) -> torch.Tensor:
        self.calls.append((row, new, past))
        return torch.nn.functional.one_hot(torch.tensor([new[0][-1] + 1]), 50).float()


def test_tandem_contender_decodes_greedily_behind_the_prompt() -> None:
    backend = CountingBackend()
    seconds = tandem_contender(backend)([5, 6, 7], 3)  # type: ignore[arg-type]
    assert all(s > 0 for s in seconds)
    steps = [([5, 6, 7], 0), ([8], 3), ([9], 4), ([10], 5)]
    assert backend.calls == [(0, [ids], [past]) for ids, past in steps]


def test_transformers_contender_decodes_as_many_tokens_behind_its_prefill(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model, counts = AutoModelForCausalLM.from_pretrained(tiny_teacher), []
    generate, forward = model.generate, model.forward

    def spy(ids: torch.Tensor, **settings: Any) -> Any:
        output = generate(ids, **settings)
        counts.append(output.shape[1] - ids.shape[1])
        return output

    def stall_prefill(input_ids: torch.Tensor, **settings: Any) -> Any:
        if input_ids.shape[1] > 1:
            time.sleep(STALL_S)
        return forward(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", spy)
    monkeypatch.setattr(model, "forward", stall_prefill)
    prefill_s, decode_s = over_transformers(model)([5, 6, 7], 8)
    assert counts == [9]
    assert prefill_s >= STALL_S
    assert decode_s > 0
