"""Servers that end otherwise than by a drain do not pass R13."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.calls import Outcome
from tests.faults.result import RowResult, Size
from tests.faults.server import r13_drain
from tests.faults.server.r13_drain import DRAIN_DELAY_S, LONG_GRACE_S, Drain, judge
from tests.support.processes import TandemProcess
from tests.support.tiny_bundle import tiny_student


def impatient(number: int, folder: Path) -> TandemProcess:
    """A server without a grace, which is thought to have a long one."""
    times = ("--drain-delay-s", str(DRAIN_DELAY_S), "--drain-grace-s", "0")
    return tiny_student("server", folder, *times)


def test_server_that_does_not_wait_for_running_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(r13_drain.NUM_RUNS, Size.CI, 1)
    monkeypatch.setattr(r13_drain, "new_server", impatient)
    problems = r13_drain.run(Size.CI).problems
    assert any("samples cut within the grace" in problem for problem in problems)


OUTCOMES = [Outcome("", 0, 0, 2, "OK")] * 16 + [Outcome("", 1.5, 1.5, 2, "UNAVAILABLE", 1.0)]
GOOD = Drain(LONG_GRACE_S, 1.0, 2.0, 0, OUTCOMES, 0, 0)


def judged(drain: Drain) -> list[str]:
    result = RowResult("R13", "")
    judge(result, [drain])
    return result.problems


@pytest.mark.parametrize(
    ("drain", "objection"),
    [
        (replace(GOOD, outcomes=[*OUTCOMES, Outcome("", 0, 0, 2, "UNAVAILABLE")]), "1 calls lost"),
        (replace(GOOD, exit_code=None), "exit code None"),
        (replace(GOOD, took_s=LONG_GRACE_S + DRAIN_DELAY_S + 5.1), "ended 5.1 s behind the grace"),
        (replace(GOOD, num_partial=1), "1 answers broke off"),
        (replace(GOOD, outcomes=OUTCOMES[9:]), "only 7 calls ran"),
        (replace(GOOD, outcomes=[*OUTCOMES, Outcome("", 1.5, 1.5, 2, "INTERNAL")]), "INTERNAL"),
    ],
)
def test_missed_target_is_told(drain: Drain, objection: str) -> None:
    assert judged(GOOD) == []
    assert any(objection in problem for problem in judged(drain)), judged(drain)


def test_short_grace_that_cuts_nothing_says_nothing() -> None:
    result = RowResult("R13", "")
    judge(result, [GOOD, replace(GOOD, grace_s=r13_drain.SHORT_GRACE_S)])
    assert result.problems == ["the short grace was long enough for all"]
