"""Clients that repeat nothing do not pass R14."""

from __future__ import annotations

import pytest

from tests.faults.result import Size
from tests.faults.server import r14_killed


@pytest.mark.nightly
def test_clients_that_repeat_nothing_see_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r14_killed, "max_attempts", 1)
    monkeypatch.setattr(r14_killed, "NUM_CALLS_AROUND", 32)
    result = r14_killed.run(Size.CI)
    assert result.num_lost > 0
    assert any("calls failed" in problem for problem in result.problems)
