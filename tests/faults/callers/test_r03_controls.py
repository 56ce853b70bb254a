"""Servers that refuse badly do not pass R3."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.broken import BROKEN
from tests.faults.callers import r03_overload
from tests.faults.callers.r03_overload import Plan, Round, judge
from tests.faults.calls import Outcome
from tests.faults.result import RowResult, Size


def test_bare_refusals_that_keep_their_place_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BROKEN, "refusals")
    monkeypatch.setattr(r03_overload, "PROGRAM", "tests.faults.broken")
    monkeypatch.setattr("tests.faults.served.SETTLE_S", 0.2)
    monkeypatch.setitem(r03_overload.PLANS, Size.CI, Plan(1, 0.1, 0.3, 0.3))
    result = r03_overload.run(Size.CI)
    assert any("without RetryInfo" in problem for problem in result.problems)
    assert any("of 20 requests afterwards failed" in leak for leak in result.leaks)


def outcomes(code: str, count: int, every_s: float, latency_s: float) -> list[Outcome]:
    """Calls on time, which end so long after they were due."""
    times_s = [number * every_s for number in range(count)]
    delay_s = 1.0 if code == "RESOURCE_EXHAUSTED" else None
    return [Outcome("", due_s, due_s, due_s + latency_s, code, delay_s) for due_s in times_s]


LONE = outcomes("OK", 50, 0.1, 0.1)
ADMITTED = outcomes("OK", 100, 0.1, 0.2)
REFUSED = outcomes("RESOURCE_EXHAUSTED", 400, 0.025, 0.01)
GOOD = Round(LONE, 10.0, [*ADMITTED, *REFUSED], 0.1)


def judged(seen: Round) -> list[str]:
    result = RowResult("R3", "")
    judge(result, [seen])
    return result.problems


def test_good_round_passes() -> None:
    assert judged(GOOD) == []


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (Round(LONE, 11.2, GOOD.outcomes, 0.1), "times the peak sent"),
        (replace(GOOD, outcomes=[*ADMITTED[::2], *REFUSED, *REFUSED[::8]]), "goodput is"),
        (replace(GOOD, lone=outcomes("OK", 50, 0.1, 0.06)), "3.33 times a lone caller's"),
        (
            replace(GOOD, outcomes=[*ADMITTED, *outcomes(REFUSED[0].code, 400, 0.025, 0.06)]),
            "p99 of refusals is 60 ms",
        ),
        (replace(GOOD, outcomes=[*ADMITTED * 4, *REFUSED[:100]]), "only 100 calls were refused"),
        (replace(GOOD, outcomes=[*GOOD.outcomes, Outcome("", 0, 0, 1, "INTERNAL")]), "INTERNAL"),
    ],
)
def test_missed_target_is_told(change: Round, objection: str) -> None:
    assert any(objection in problem for problem in judged(change)), judged(change)
