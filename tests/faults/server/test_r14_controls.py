"""Clients that repeat nothing do not pass R14."""

from __future__ import annotations

import pytest

from tests.faults.calls import Outcome
from tests.faults.result import RowResult, Size
from tests.faults.server import r14_killed


def test_call_that_failed_is_lost() -> None:
    result = RowResult("R14", "")
    r14_killed.judge(result, [Outcome("", 0, 0, 1, "OK")] * 3)
    assert result.is_passed
    r14_killed.judge(result, [Outcome("", 0, 0, 1, code) for code in ("OK", "UNAVAILABLE")])
    assert result.num_lost == 1 and "1 calls failed" in result.problems[0]


@pytest.mark.nightly
def test_clients_that_repeat_nothing_see_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r14_killed, "max_attempts", 1)
    monkeypatch.setattr(r14_killed, "NUM_CALLS_AROUND", 32)
    result = r14_killed.run(Size.CI)
    assert result.num_lost > 0
    assert any("calls failed" in problem for problem in result.problems)
