"""Some storms, and that one over a broken server is noticed."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from serve.engine.mail import Inbox
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Event, TokenEvent
from serve.pair.remote_messages import AnswerEvents
from serve.pair.remote_teacher import RemoteTeacher
from serve.rpc.replay import RunKey
from tests.faults import rig
from tests.faults.storm import __main__ as storm
from tests.faults.storm.plan import make_plan

SECONDS = 0.25
MAX_STORMS = 5  # which of the broken parts a storm meets is up to chance
REMOTE = 1
"""A plan with a remote teacher, and with certificates."""


@pytest.mark.parametrize("seed", [REMOTE, 7])
def test_storm_leaves_nothing_behind(seed: int) -> None:
    outcome = storm.run(seed, SECONDS)
    assert not outcome.problems, outcome
    assert outcome.codes["OK"] and outcome.num_faults, outcome


def test_plan_is_its_seeds() -> None:
    acts = [[act for act, _ in zip(make_plan(7).acts(), range(50), strict=False)] for _ in "12"]
    assert acts[0] == acts[1] and make_plan(7) == make_plan(7) != make_plan(8)


def share_tenants() -> list[Any]:
    return [
        patch.object(RunKey, "__hash__", lambda key: hash(key.request_id)),
        patch.object(RunKey, "__eq__", lambda key, other: key.request_id == other.request_id),
    ]


def forget_taints() -> list[Any]:
    return [patch.object(ModelRunner, "_clean", lambda runner, row: None)]


def keep_slots() -> list[Any]:
    release = Inbox.release

    def leaking(inbox: Inbox, count: int) -> None:
        if inbox.num_inside % 5:
            release(inbox, count)

    return [patch.object(Inbox, "release", leaking)]


def break_remote_teacher() -> list[Any]:
    """Have it drop tokens, repeat others, and keep its calls."""
    take, run, numbers = AnswerEvents.take, RemoteTeacher._run, itertools.count(1)

    def breaking(answer: AnswerEvents, response: Any) -> list[Event]:
        events, number = take(answer, response), next(numbers)
        if not any(isinstance(event, TokenEvent) for event in events):
            return events
        return events * 2 if number % 7 == 0 else events[1:] if number % 5 == 0 else events

    def keeping(teacher: RemoteTeacher, call: Any, work: Any) -> None:
        run(teacher, call, work)
        call.task.add_done_callback(lambda task: teacher._calls.add(call))

    return [
        patch.object(AnswerEvents, "take", breaking),
        patch.object(RemoteTeacher, "_run", keeping),
    ]


@pytest.mark.parametrize(
    ("patches", "seed", "problems"),
    [
        (
            [*share_tenants(), *forget_taints(), *keep_slots()],
            9,
            ["INVALID_ARGUMENT (request_id", "non-finite", "ledger_imbalance"],
        ),
        (break_remote_teacher(), REMOTE, ["came again", "did not come", "teacher slots"]),
    ],
    ids=["local", "remote"],
)
def test_storm_over_a_broken_server_is_noticed(
    patches: list[Any], seed: int, problems: list[str]
) -> None:
    with ExitStack() as stack:
        for one in (*patches, patch.object(rig, "SETTLE_S", 0.3)):
            stack.enter_context(one)
        found: list[str] = []
        for _ in range(MAX_STORMS):
            found += storm.run(seed, 2 * SECONDS).problems
            missing = [p for p in problems if not any(p in text for text in found)]
            if not missing:
                break
    assert not missing, found
