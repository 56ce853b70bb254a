"""What an engine without work holds: nothing of those whom it served."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.runner import PromptEntry
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import GenerationRequest, Sequence, SequenceGroup
from serve.sampling.params import SamplingParams


def held(prompt: tuple[int, ...]) -> list[Any]:
    """Return what is alive of work on a prompt, and may hold logits or keys and values."""
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (Sequence, SequenceGroup, PromptEntry)]
    prompts = [o.group.prompt if type(o) is Sequence else o.prompt for o in alive]
    return [o for o, p in zip(alive, prompts, strict=True) if p.token_ids == prompt]


@pytest.mark.parametrize("prompt", [(21, 22, 23), tuple(range(9, 39))])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_engine_without_work_holds_no_logits(
    make_backend: Any, prompt: tuple[int, ...], in_one_pass: bool
) -> None:
    backend = make_backend()
    engine = Engine(
        backend,
        eos_token_ids=frozenset({backend.EOS}),
        max_pass_tokens=8,
        max_prefix_cache_bytes=0,
        scores_in_one_pass=in_one_pass,
    )
    ends: list[Any] = []
    sampling = SamplingParams(num_samples=3, max_tokens=4, ignore_eos=True)
    engine.submit(GenerationRequest("r", prompt, sampling), ends.append)
    steps = OfflineEngine(engine).run()
    next(steps)
    assert held(prompt), "they would be seen"
    for _ in steps:
        pass
    engine.score(ScoringRequest("s", prompt, ((7, 8, 9), (4, 5)), with_logits=True))
    for _ in OfflineEngine(engine).run():
        pass
    assert ends and held(prompt) == []
