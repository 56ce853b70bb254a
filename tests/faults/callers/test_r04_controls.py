"""Clients without a budget for retries do not pass R4."""

from __future__ import annotations

import json

import pytest

from serve.client import channel
from tests.faults.callers import r04_retry_storm
from tests.faults.callers.r04_retry_storm import Storm, judge
from tests.faults.calls import Outcome
from tests.faults.result import RowResult, Size


def test_clients_without_a_budget_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the budget that ships 400 calls come to 900 attempts at most."""
    config = json.loads(channel.service_config(channel.MAX_ATTEMPTS))
    del config["retryThrottling"]
    monkeypatch.setattr(channel, "service_config", lambda *given: json.dumps(config))
    monkeypatch.setitem(r04_retry_storm.NUM_CALLS, Size.CI, 400)
    # So short that they are over before the first comes again.
    monkeypatch.setattr(r04_retry_storm, "OVERLOAD", 20.0)
    result = r04_retry_storm.run(Size.CI)
    assert result.measured["num_retries"] > 500, result.measured
    assert any("attempts for a call" in problem for problem in result.problems)


def judged(num_ok: int, num_refused: int, num_attempts: int, code: str) -> list[str]:
    outcomes = [Outcome("", 0, 0, 1, "OK")] * num_ok + [Outcome("", 0, 0, 1, code)] * num_refused
    result = RowResult("R4", "")
    judge(result, Storm(outcomes, num_attempts))
    return result.problems


@pytest.mark.parametrize(
    ("num_ok", "num_refused", "num_attempts", "code", "problems"),
    [
        (20, 80, 130, "RESOURCE_EXHAUSTED", []),
        (20, 80, 131, "RESOURCE_EXHAUSTED", ["1.31 attempts for a call"]),
        (20, 80, 100, "RESOURCE_EXHAUSTED", ["nobody retried: this was no retry storm"]),
        (60, 40, 120, "RESOURCE_EXHAUSTED", ["only 40 calls were refused"]),
        (20, 80, 120, "INTERNAL", ["calls ended with ['INTERNAL']", "only 0 calls were refused"]),
    ],
)
def test_storm_is_judged(
    num_ok: int, num_refused: int, num_attempts: int, code: str, problems: list[str]
) -> None:
    assert judged(num_ok, num_refused, num_attempts, code) == problems
