"""Completions by the student itself: text to train on, and a look at whether it still speaks.

The student as it is now answers through the engine that serves it. On policy (Agarwal et al. 2024,
"GKD"; MiniLLM) it is then trained where it goes wrong by itself. The share of repeated 4-grams in
its answers tells when training collapses into loops, which the loss on the teacher's text hides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from export.teacher.accept import repeated_share
from export.teacher.examples import Example
from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import GenerationRequest
from serve.models.backend import Backend
from serve.models.torch_backend import TorchBackend
from serve.sampling.params import SamplingParams
from serve.text.real_tokens import EVERY_ROW, RealTokens

COLLAPSE_SHARE = 0.5
"""Share of repeated 4-grams above which a text is a loop rather than an answer."""


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How the student answers: `max_num_seqs` prompts at a time."""

    temperature: float
    max_tokens: int
    max_num_seqs: int
    eos_token_ids: frozenset[int]
    seed: int = 0


def answer(
    student: Any,
    prompts: Sequence[tuple[int, ...]],
    settings: AnswerSettings,
    real_tokens: RealTokens = EVERY_ROW,
) -> list[Example]:
    """Return the student's completions of `prompts` (token ids), in their order.

    The student is copied, in bfloat16, and not changed. Prompt i is sampled with seed + i.
    """
    return answer_with(_backend(student, prompts, settings, real_tokens), prompts, settings)


def answer_with(
    backend: Backend, prompts: Sequence[tuple[int, ...]], settings: AnswerSettings
) -> list[Example]:
    """Return a loaded model's completions of `prompts`, as `answer` does."""
    engine = Engine(
        backend,
        eos_token_ids=settings.eos_token_ids,
        max_waiting=len(prompts),
        name="student",
    )
    requests = [
        GenerationRequest(
            str(index),
            prompt,
            SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=settings.seed + index,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    ends = OfflineEngine(engine).generate(requests)
    completions = {request.request_id: event.token_ids for request, event in ends}
    return [Example(r.prompt_token_ids, completions[r.request_id]) for r in requests]


def repetition(examples: Sequence[Example]) -> float:
    """Return the mean share of repeated 4-grams in the completions, 0 to 1."""
    return sum(repeated_share(e.completion_token_ids) for e in examples) / len(examples)


def _backend(
    student: Any,
    prompts: Sequence[tuple[int, ...]],
    settings: AnswerSettings,
    real_tokens: RealTokens,
) -> TorchBackend:
    model = copy.deepcopy(student).to(torch.bfloat16).eval()
    return TorchBackend.take(
        model,
        device=str(next(student.parameters()).device),
        max_num_seqs=min(settings.max_num_seqs, len(prompts)),
        max_model_len=max(map(len, prompts)) + settings.max_tokens,
        real_tokens=real_tokens,
    )
