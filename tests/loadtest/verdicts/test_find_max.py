"""The search for the highest rate, against servers whose highest rate is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from loadtest.config import LatencyObjective, Tally
from loadtest.verdicts.find_max import (
    MaxRate,
    Measure,
    RateStep,
    RateVerdict,
    Search,
    find_max,
    judge,
)

TTFT = LatencyObjective("ttft", 95, 0.2)


def sharp(limit_rps: float) -> Measure:
    """A server that answers all in time up to its limit and none above."""
    return lambda rate_rps, repeat: [Tally(TTFT, 200 if rate_rps <= limit_rps else 0, 200)]


def rates(found: MaxRate) -> list[float]:
    return [step.rate_rps for step in found.steps]


def test_rate_is_doubled_then_bisected() -> None:
    found = find_max(sharp(5.3), Search(start_rps=1, relative_width=0.1))
    assert rates(found) == [1, 2, 4, 8, 6, 5, 5.5]
    assert (found.meets_rps, found.fails_rps) == (5, 5.5)


def test_rate_that_fails_at_once_is_halved() -> None:
    found = find_max(sharp(0.3), Search(start_rps=1, relative_width=0.5))
    assert rates(found) == [1, 0.5, 0.25, 0.375]
    assert (found.meets_rps, found.fails_rps) == (0.25, 0.375)


def test_search_ends_at_its_bounds() -> None:
    never = find_max(sharp(0), Search(start_rps=1, min_rps=0.3))
    assert (never.meets_rps, never.fails_rps, rates(never)) == (None, 0.3, [1, 0.5, 0.3])
    always = find_max(sharp(1e9), Search(start_rps=1, max_rps=5))
    assert (always.meets_rps, always.fails_rps, rates(always)) == (5, None, [1, 2, 4, 5])


def test_objective_missed_for_sure_decides_over_one_that_is_met() -> None:
    e2e = LatencyObjective("e2e", 50, 1.0)
    assert judge([Tally(TTFT, 500, 500), Tally(e2e, 500, 500)]) is RateVerdict.MEETS
    assert judge([Tally(TTFT, 500, 500), Tally(e2e, 100, 500)]) is RateVerdict.FAILS
    assert judge([Tally(TTFT, 9, 10), Tally(e2e, 500, 500)]) is RateVerdict.UNDECIDED


def test_judge_by_hand() -> None:
    """All of n good: Wilson's low end is n / (n + 3.8415), above 0.95 from n = 73."""
    assert judge([Tally(TTFT, 72, 72)]) is RateVerdict.UNDECIDED
    assert judge([Tally(TTFT, 73, 73)]) is RateVerdict.MEETS


def test_too_few_requests_prolong_and_counts_add_up() -> None:
    calls = []

    def measure(rate_rps: float, repeat: int) -> list[Tally]:
        calls.append((rate_rps, repeat))
        return [Tally(TTFT, 30, 30)]

    seen: list[RateStep] = []
    found = find_max(measure, Search(start_rps=1, max_rps=1), seen.append)
    assert calls == [(1, 0), (1, 1), (1, 2)]
    assert found.steps == (RateStep(1, RateVerdict.MEETS, (Tally(TTFT, 90, 90),)),) == tuple(seen)


def test_rate_that_stays_undecided_is_not_met() -> None:
    found = find_max(
        lambda rate_rps, repeat: [Tally(TTFT, 19, 20)],
        Search(start_rps=1, min_rps=1, max_repeats=2),
    )
    assert (found.meets_rps, found.fails_rps) == (None, 1)
    assert found.steps[0].verdict is RateVerdict.UNDECIDED
    assert found.steps[0].tallies == (Tally(TTFT, 57, 60),)


@pytest.mark.parametrize("tallies", [[], [Tally(TTFT, 0, 0)]])
def test_nothing_offered_cannot_be_judged(tallies: list[Tally]) -> None:
    with pytest.raises(ValueError, match="nothing to judge"):
        find_max(lambda rate_rps, repeat: tallies, Search())


@pytest.mark.parametrize(
    "search",
    [
        {"start_rps": 0.0},
        {"start_rps": 2.0, "max_rps": 1.0},
        {"min_rps": math.nan},
        {"relative_width": 0.0},
        {"max_repeats": -1},
    ],
)
def test_search_that_cannot_end_is_refused(search: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"give 0 < min_rps|must be above 0"):
        Search(**search)  # type: ignore[arg-type]


def queue(service_rps: float, num_requests: int) -> Measure:
    """Simulate an M/M/1 server by Lindley's recursion."""

    def measure(rate_rps: float, repeat: int) -> list[Tally]:
        rng = np.random.default_rng((round(rate_rps * 1e6), repeat))
        gaps_s = rng.exponential(1 / rate_rps, size=num_requests)
        services_s = rng.exponential(1 / service_rps, size=num_requests)
        waits_s = itertools.accumulate(
            zip(services_s[:-1], gaps_s[1:], strict=True),
            lambda wait_s, each: max(0.0, wait_s + each[0] - each[1]),
            initial=0.0,
        )
        times_s = np.fromiter(waits_s, float) + services_s
        return [Tally(TTFT, int((times_s <= TTFT.limit_s).sum()), num_requests)]

    return measure


def test_highest_rate_of_a_queue_is_that_of_theory() -> None:
    """Times in M/M/1 are exponential with rate μ − λ: p95 = 0.2 s at λ = μ − ln 20 / 0.2 s."""
    service_rps = 100.0
    theory_rps = service_rps - math.log(20) / TTFT.limit_s
    assert theory_rps == pytest.approx(85.02, abs=0.01)
    found = find_max(queue(service_rps, 20_000), Search(start_rps=1, relative_width=0.03))
    assert found.meets_rps is not None and found.fails_rps is not None
    assert found.fails_rps / found.meets_rps <= 1.03
    assert found.meets_rps == pytest.approx(theory_rps, rel=0.06)
