"""Turns on shared cores."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from serve.engine.turns import StepArbiter


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if is_true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came true")


def start(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def taker(arbiter: StepArbiter, priority: int, order: list[int]) -> Callable[[], None]:
    def take() -> None:
        with arbiter.turn(priority):
            order.append(priority)

    return take


def test_turn_goes_to_the_lowest_priority_number() -> None:
    arbiter, order = StepArbiter(max_wait_s=60), list[int]()
    with arbiter.turn(3):
        threads = [start(taker(arbiter, priority, order)) for priority in (2, 0, 1)]
        wait_until(lambda: len(arbiter.waiting) == 3)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2]


def test_claim_keeps_the_less_urgent_away_between_two_turns() -> None:
    arbiter, order = StepArbiter(max_wait_s=60), list[int]()
    arbiter.claim(0)
    thread = start(taker(arbiter, 1, order))
    wait_until(lambda: len(arbiter.waiting) == 1)
    taker(arbiter, 0, order)()
    taker(arbiter, 0, order)()
    assert order == [0, 0]
    arbiter.unclaim(0)
    thread.join(10)
    assert order == [0, 0, 1]


def test_patience_ends_after_max_wait_whatever_is_claimed() -> None:
    arbiter, order = StepArbiter(max_wait_s=0.01), list[int]()
    arbiter.claim(0)
    start(taker(arbiter, 1, order)).join(10)
    assert order == [1]


def test_turns_never_overlap() -> None:
    arbiter, inside, most = StepArbiter(), 0, 0

    def work(priority: int) -> None:
        nonlocal inside, most
        for _ in range(200):
            with arbiter.turn(priority):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [start(lambda priority=priority: work(priority)) for priority in range(4)]
    for thread in threads:
        thread.join(10)
    assert (most, inside) == (1, 0)


def test_turn_is_given_back_when_the_step_fails() -> None:
    arbiter = StepArbiter()
    with pytest.raises(RuntimeError), arbiter.turn(0):
        raise RuntimeError
    with arbiter.turn(1):
        pass


def test_turn_and_claim_of_an_engine_that_hangs_can_be_taken_away() -> None:
    arbiter, order, may_go_on = StepArbiter(max_wait_s=60), list[int](), threading.Event()

    def hang() -> None:
        arbiter.claim(0)
        with arbiter.turn(0):
            may_go_on.wait(10)

    hung = start(hang)
    wait_until(lambda: arbiter.holder == 0)
    other = start(taker(arbiter, 1, order))
    wait_until(lambda: len(arbiter.waiting) == 1)
    assert order == []
    arbiter.drop(0)
    other.join(10)
    assert order == [1]
    with arbiter.turn(1):
        may_go_on.set()
        hung.join(10)
        assert arbiter.holder == 1
