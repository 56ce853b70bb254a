"""What counts as a hung step, and what does not."""

from __future__ import annotations

from serve.engine.watchdog import StepWatch


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def looks(steps: list[int], period_s: float = 0.25, max_step_s: float = 2.0) -> list[bool]:
    clock = Clock()
    watch = StepWatch(max_step_s, clock)
    found = []
    for step in steps:
        clock.now_s += period_s
        found.append(watch.look(step))
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
