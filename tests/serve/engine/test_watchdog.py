"""What counts as a hung step, and what does not; who may end an engine when."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest

from serve.engine.turns import StepArbiter
from serve.engine.watchdog import AbandonedError, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def looks(steps: list[int], period_s: float = 0.25, max_step_s: float = 2.0) -> list[bool]:
    """Look while the engine is in these steps, 0 in none."""
    clock = Clock()
    watchdog = Watchdog(max_step_s, clock=clock)
    found = []
    for step, same in itertools.groupby(steps):
        with watchdog.step() if step else nullcontext():
            for _ in same:
                clock.now_s += period_s
                found.append(watchdog.look())
    return found


def test_step_seen_for_longer_than_the_bound_hangs() -> None:
    assert looks([7] * 10) == [False] * 9 + [True]


def test_steps_that_follow_each_other_are_no_hang() -> None:
    assert not any(looks(list(range(1, 40))))


def test_idle_engine_does_not_hang() -> None:
    assert not any(looks([0] * 40))


def test_wait_in_between_begins_anew() -> None:
    assert not any(looks([*[7] * 9, 0, *[7] * 9]))


def test_time_in_which_nobody_looked_counts_for_little() -> None:
    """A stopped process finds its step where it was, however long ago."""
    assert looks([7, 7], period_s=3600.0) == [False, False]


def test_model_s_part_of_a_step_is_a_step_of_its_own() -> None:
    clock = Clock()
    watchdog = Watchdog(2.0, clock=clock)
    found = []
    with watchdog.step():
        for part in (nullcontext(), watchdog.turn(), nullcontext()):
            with part:
                for _ in range(4):
                    clock.now_s += 0.4
                    found.append(watchdog.look())
    assert not any(found[:9]) and len(found) == 12


def test_engine_is_ended_in_the_model_and_nowhere_else_in_a_step() -> None:
    watchdog, ends = Watchdog(1.0), list[str]()
    with watchdog.step():
        watchdog.abandon(lambda: ends.append("on the host"))
        with pytest.raises(AbandonedError), watchdog.turn():
            watchdog.abandon(lambda: ends.append("in the model"))
    assert ends == ["in the model"] and watchdog.is_abandoned


def test_engine_that_is_ended_before_its_turn_gets_none() -> None:
    arbiter, has_run = StepArbiter(), False
    watchdog = Watchdog(1.0, arbiter, priority=1)
    with watchdog.step():
        with watchdog.unowned():
            pass
        watchdog.is_abandoned = True
        with pytest.raises(AbandonedError), watchdog.turn():
            has_run = True
    assert not has_run
    with arbiter.turn(0):
        """It is free."""
