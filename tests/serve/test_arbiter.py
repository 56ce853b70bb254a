"""Turns on shared cores."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from serve.arbiter import StepArbiter


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if is_true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came true")


def test_turn_goes_to_the_lowest_priority_number_then_to_the_first_that_came() -> None:
    arbiter, order = StepArbiter(), list[str]()

    def take(priority: int, name: str) -> None:
        with arbiter.turn(priority):
            order.append(name)

    waiters = [(1, "teacher"), (0, "student"), (0, "student again"), (1, "teacher again")]
    threads = [threading.Thread(target=take, args=waiter) for waiter in waiters]
    with arbiter.turn(1):
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda count=count: len(arbiter._waiting) == count)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == ["student", "student again", "teacher", "teacher again"]


def test_turns_never_overlap() -> None:
    arbiter, inside, most = StepArbiter(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with arbiter.turn(0):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (most, inside) == (1, 0)


def test_turn_is_given_back_when_the_step_fails() -> None:
    arbiter = StepArbiter()
    with pytest.raises(RuntimeError), arbiter.turn(0):
        raise RuntimeError
    with arbiter.turn(1):
        pass
