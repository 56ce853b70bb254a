"""Objectives: how they are written, and which requests meet them."""

from __future__ import annotations

import pytest

from loadtest.config import LatencyObjective, Slo, Tally, parse_slo
from loadtest.records import RequestRecord
from tests.support.load_tests import planned, recorded


def record(*token_times_s: float, status: str = "OK") -> RequestRecord:
    """A request due at 10 s, sent late; its tokens' times count from when it was due."""
    times_s = [10.0 + time_s for time_s in token_times_s]
    ended_s = times_s[-1] if times_s else 10.5
    plan = planned(intended_s=10.0)
    return recorded(plan, *times_s, sent_s=10.25, ended_s=ended_s, status=status)


def is_met(text: str, request: RequestRecord) -> bool:
    return parse_slo(text).is_good(request)


def test_slo_is_parsed() -> None:
    assert parse_slo("ttft_p95=0.2,itl_p50=0.02, e2e_p99.9=5,tpot_p90=1e-2").objectives == (
        LatencyObjective("ttft", 95, 0.2),
        LatencyObjective("itl", 50, 0.02),
        LatencyObjective("e2e", 99.9, 5.0),
        LatencyObjective("tpot", 90, 0.01),
    )
    assert parse_slo(" ") == Slo(())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("ttft_p95=0.2,latency_p95=1", "slo 'latency_p95=1': .* metrics are ttft, itl, tpot, e2e"),
        ("ttft=0.2", "slo 'ttft=0.2': write METRIC_pPERCENTILE=SECONDS"),
        ("ttft_p95=0.2,", "slo '': write"),
        ("ttft_p49=1", "slo 'ttft_p49=1': percentiles are p50 to p99.9"),
        ("ttft_p100=1", "percentiles are p50 to p99.9"),
        ("ttft_p95=fast", "'fast' is no limit; give seconds above 0"),
        ("ttft_p95=0", "'0' is no limit"),
        ("ttft_p95=nan", "'nan' is no limit"),
        ("ttft_p95=inf", "'inf' is no limit"),
        ("itl_p95=1,itl_p95=2", "itl_p95 is given 2 times; give one"),
    ],
)
def test_slo_that_cannot_be_read_names_the_piece(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "good"),
    # First token after 0.5 s, then 0.25, 0.25, 1.0: mean 0.5, end after 2 s.
    [
        ("ttft_p95=0.5", True),
        ("ttft_p95=0.499", False),
        ("tpot_p95=0.5", True),
        ("tpot_p95=0.499", False),
        ("e2e_p95=2", True),
        ("e2e_p95=1.999", False),
        ("itl_p66=0.25", True),  # 2 of 3 are within it
        ("itl_p67=0.25", False),
        ("itl_p99=1", True),
        ("ttft_p95=0.5,e2e_p95=1", False),
        ("", True),
    ],
)
def test_request_is_good_when_it_is_within_every_limit(slo: str, good: bool) -> None:
    assert is_met(slo, record(0.5, 0.75, 1.0, 2.0)) is good


def test_failed_request_is_never_good() -> None:
    assert not is_met("", record(0.1, status="UNAVAILABLE"))
    assert not is_met("ttft_p95=9", record(0.1, status="DEADLINE_EXCEEDED"))


def test_request_of_one_token_has_no_gap_to_miss_and_one_of_none_no_first() -> None:
    assert is_met("itl_p95=0.001,tpot_p95=0.001", record(0.5))
    assert not is_met("ttft_p95=9", record())
    assert is_met("e2e_p95=9", record())


def test_tallies_count_every_offered_request_per_objective() -> None:
    records = [record(0.1, 0.2), record(0.1, 5.0), record(0.1, status="INTERNAL")]
    slo = parse_slo("ttft_p95=1,e2e_p95=1")
    ttft, e2e = slo.objectives
    assert slo.tallies(records) == (Tally(ttft, 2, 3), Tally(e2e, 1, 3))
    assert sum(map(slo.is_good, records)) == 1
