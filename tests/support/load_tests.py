"""Requests of a load test, what became of them, and summaries, each with what a test says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from estimators.estimate import Estimate
from loadtest.analysis.summary import Cell, Distribution, Quality, Summary, Validity
from loadtest.records import Phase, PlannedRequest, RequestRecord, SampleRecord

NOTHING = Distribution(0, None, None, None, None, None)
"""A latency that no request has."""


def planned(number: int = 0, arm: str = "student", **changes: Any) -> PlannedRequest:
    """Return a measured request at 1 per second, due at 0 s."""
    given = {
        "rate_rps": 1.0, "block": 0, "pair": number, "prompt_id": "p", "seed": 0,
        "phase": Phase.MEASURED, "intended_s": 0.0, **changes,
    }  # fmt: skip
    return PlannedRequest(number, arm, **given)


def recorded(
    plan: PlannedRequest | None = None,
    *times_s: float,
    sent_s: float = 0.0,
    ended_s: float = 1.0,
    status: str = "OK",
    samples: Sequence[SampleRecord] | None = None,
) -> RequestRecord:
    """Return a request that was sent at once, and its one sample with tokens at these times."""
    if samples is None:
        samples = [SampleRecord(0, "STOP", list(range(len(times_s))), list(times_s))]
    return RequestRecord(plan or planned(), sent_s, ended_s, status, samples=list(samples))


def quality_of(**values: Any) -> Quality:
    """Return a quality of which nothing else is known."""
    nothing: dict[str, Any] = {
        "pass_at_k": {}, "majority_correct": None, "k3": None, "exact_kl": None,
        "k3_histogram": None, "k3_by_position": (),
    }  # fmt: skip
    return Quality(**{**nothing, **values})


def cell_of(arm: str = "student", load: float = 1.0, **values: Any) -> Cell:
    """Return an arm at a load with 40 answered requests, of which nothing else is known."""
    given: dict[str, Any] = {
        "num_offered": 40, "statuses": {"OK": 40}, "ttft": NOTHING, "itl": NOTHING,
        "tpot": NOTHING, "e2e": NOTHING, "itl_histogram": None, "throughput_rps": load,
        "output_tokens_per_s": 100.0, "goodput": None, "quality": None, **values,
    }  # fmt: skip
    return Cell(arm, load, **given)


def summary_of(*cells: Cell, **values: Any) -> Summary:
    """Return the summary of a valid run."""
    given: dict[str, Any] = {
        "config": {"arrival": "poisson"}, "schedule_sha256": "5e", "versions": {}, "models": (),
        "validity": Validity(True, (), 0.0, 0.1), "num_errors": 0, "comparisons": (), **values,
    }  # fmt: skip
    return Summary(cells=cells, **given)


def around(value: float, half_width: float = 0.0, n: int = 40) -> Estimate:
    """Return an estimate with an interval around it; without a width it has none."""
    if not half_width:
        return Estimate(value, n=n)
    return Estimate(value, value - half_width, value + half_width, n)
