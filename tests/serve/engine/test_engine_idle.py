"""What an engine without work holds: nothing of those whom it served."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from serve.engine.runner import PromptEntry
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import Sequence, SequenceGroup
from tests.support.engines import make_engine, run, submit


def held(prompt: tuple[int, ...]) -> list[Any]:
    """Return what is alive of work on a prompt, and may hold logits or keys and values."""
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (Sequence, SequenceGroup, PromptEntry)]
    prompts = [o.group.prompt if type(o) is Sequence else o.prompt for o in alive]
    return [o for o, p in zip(alive, prompts, strict=True) if p.token_ids == prompt]


@pytest.mark.parametrize("prompt", [(21, 22, 23), tuple(range(9, 39))])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_engine_without_work_holds_no_logits(prompt: tuple[int, ...], in_one_pass: bool) -> None:
    engine = make_engine(
        max_pass_tokens=8, max_prefix_cache_bytes=0, scores_in_one_pass=in_one_pass
    )
    reader = submit(engine, "r", prompt, num_samples=3, max_tokens=4, ignore_eos=True)
    engine.core.step()
    assert held(prompt), "they would be seen"
    run(engine)
    engine.score(ScoringRequest("s", prompt, ((7, 8, 9), (4, 5)), with_logits=True))
    run(engine)
    assert reader.endings and held(prompt) == []
