"""A server that leaks does not pass R22."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.faults.broken import BROKEN
from tests.faults.result import RowResult, Size
from tests.faults.server import r22_soak
from tests.faults.server.r22_soak import PLANS, Soak, judge

WANTED = Counter({"OK": 9, "CANCELLED": 1, "DEADLINE_EXCEEDED": 1, "INVALID_ARGUMENT": 1})


def test_build_that_leaks_memory_and_tasks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BROKEN, "leaks")
    monkeypatch.setattr(r22_soak, "PROGRAM", "tests.faults.broken")
    monkeypatch.setattr("tests.faults.served.SETTLE_S", 0.2)
    short = replace(PLANS[Size.CI], num_cycles=1, cycle_s=1.5, num_crashing=1)
    monkeypatch.setitem(r22_soak.PLANS, Size.CI, short)
    result = r22_soak.run(Size.CI)
    assert any("memory grew" in problem for problem in result.problems), result.measured
    assert any("served_tasks" in leak for leak in result.leaks)


def judged(size: Size, soak: Soak) -> list[str]:
    result = RowResult("R22", "")
    judge(result, PLANS[size], soak)
    return result.problems


def test_memory_may_be_anywhere_in_the_first_half_and_is_bounded_in_the_second() -> None:
    flat = [300 * 10**6] * 10
    assert judged(Size.FULL, Soak([10**6, *flat[1:], *flat], WANTED)) == []
    assert judged(Size.FULL, Soak([*flat, *flat[1:], 340 * 10**6], WANTED)) == [
        "memory grew 36.0 MB above its mean of the second half"
    ]


def test_five_percent_of_much_is_more_than_32_mb() -> None:
    flat = [2000 * 10**6] * 10
    assert judged(Size.FULL, Soak([*flat, *flat[1:], 2090 * 10**6], WANTED)) == []
    assert len(judged(Size.FULL, Soak([*flat, *flat[1:], 2130 * 10**6], WANTED))) == 1


def test_clients_that_end_by_themselves_and_unknown_codes_are_told() -> None:
    soak = Soak([1, 1], WANTED + Counter({"INTERNAL": 1}), num_own_ends=1)
    problems = judged(Size.CI, soak)
    assert "1 clients ended before their crash" in problems
    assert any("INTERNAL" in problem for problem in problems)
