"""Some storms, and that one over a broken server is noticed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from serve.engine import Engine
from serve.replay import RunKey
from serve.runner import Runner
from tests.faults import rig, storm
from tests.faults.storm_plan import make_plan

SECONDS = 0.25


@pytest.mark.parametrize("seed", [2, 100])
def test_storm_leaves_nothing_behind(seed: int) -> None:
    outcome = storm.run(seed, SECONDS)
    assert not outcome.problems, outcome
    assert outcome.codes["OK"] and outcome.num_faults, outcome


def test_plan_is_its_seeds() -> None:
    acts = [[act for act, _ in zip(make_plan(7).acts(), range(50), strict=False)] for _ in "12"]
    assert acts[0] == acts[1] and make_plan(7) == make_plan(7) != make_plan(8)


def share_tenants() -> Any:
    return patch.object(RunKey, "__hash__", lambda key: hash(key.request_id)), patch.object(
        RunKey, "__eq__", lambda key, other: key.request_id == other.request_id
    )


def forget_taints() -> Any:
    return (patch.object(Runner, "_clean", lambda runner, row: None),)


def keep_slots() -> Any:
    release = Engine._release

    def leaking(engine: Engine) -> None:
        if engine._num_inside % 5:
            release(engine)

    return (patch.object(Engine, "_release", leaking),)


@pytest.mark.parametrize(
    ("break_it", "seed", "problem"),
    [
        (share_tenants, 343, "INVALID_ARGUMENT for"),
        (forget_taints, 100, "non-finite"),
        (keep_slots, 2, "afterwards"),
    ],
)
def test_storm_over_a_broken_server_is_noticed(break_it: Any, seed: int, problem: str) -> None:
    patches = (*break_it(), patch.object(rig, "_SETTLE_S", 0.3))
    for one in patches:
        one.start()
    try:
        outcome = storm.run(seed, 2 * SECONDS)
    finally:
        for one in patches:
            one.stop()
    assert any(problem in text for text in outcome.problems), outcome
