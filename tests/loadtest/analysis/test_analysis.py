"""From time stamps to the summary, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from estimators.estimate import Estimate
from loadtest.analysis.analysis import compare_arms, pair_up, summarize, summarize_cell
from loadtest.analysis.statistics import wilson
from loadtest.analysis.summary import Cell, Summary, from_json, to_json
from loadtest.client.runner import BlockCost
from loadtest.config import RunConfig
from loadtest.records import Phase, RequestRecord, SampleRecord
from tests.support.load_tests import planned

CONFIG = RunConfig(out=Path("out"), duration_s=10.0, slo="ttft_p95=0.2,itl_p50=0.1")


def record(number: int, arm: str = "student", **changes: Any) -> RequestRecord:
    """A request due at second `number`: a token after `ttft_s`, then one each `itl_s`."""
    settings = {"ttft_s": 0.1, "itl_s": 0.05, "num_tokens": 3, "lag_s": 0.0, "status": "OK"}
    settings |= {"phase": Phase.MEASURED, "rate_rps": 1.0, "is_correct": None, "concurrency": None}
    each = {**settings, **changes}
    due_s = float(number)
    plan = planned(
        number, arm, rate_rps=each["rate_rps"], prompt_id=f"p{number}", phase=each["phase"],
        intended_s=None if each["concurrency"] else due_s, concurrency=each["concurrency"],
    )  # fmt: skip
    first_s = due_s + each["ttft_s"]
    times_s = [first_s + i * each["itl_s"] for i in range(each["num_tokens"])]
    answer = None if each["is_correct"] is None else str(each["is_correct"])
    sample = SampleRecord(0, "STOP", list(range(len(times_s))), times_s, "", answer)
    sample.is_correct = each["is_correct"]
    ended_s = times_s[-1] if times_s else due_s + 0.5
    sent_s = due_s + each["lag_s"]
    return RequestRecord(plan, sent_s, ended_s, each["status"], samples=[sample])


def summary_of(
    records: list[RequestRecord],
    config: RunConfig = CONFIG,
    costs: Sequence[BlockCost] = (),
    *,
    problems: Sequence[str] = (),
) -> Summary:
    return summarize(
        config, "5e", records, costs,
        versions={"tandem": "1"}, models=[{"name": "student"}], cross_check={"agrees": True},
        problems=problems,
    )  # fmt: skip


def cell_of(records: list[RequestRecord]) -> Cell:
    return summarize_cell(CONFIG, "student", 1.0, records)


def test_percentiles_of_synthetic_time_stamps() -> None:
    """TTFT 0.01 to 0.20 s: p50 0.105, p90 position 17.1, p95 position 18.05, no p99 of 20."""
    cell = cell_of([record(i, ttft_s=(i + 1) / 100) for i in range(20)])
    ttft, itl, e2e = cell.ttft, cell.itl, cell.e2e
    assert ttft.p50 and ttft.p90 and ttft.p95 and itl.p50 and e2e.p50
    assert ttft.p99 is None and itl.p99 is None
    assert ttft.count == 20 and ttft.mean == pytest.approx(0.105)
    assert [each.value for each in (ttft.p50, ttft.p90, ttft.p95)] == pytest.approx(
        [0.105, 0.181, 0.1905]
    )
    assert itl.count == 40 and itl.p50.value == pytest.approx(0.05)
    assert e2e.count == 20 and e2e.p50.value == pytest.approx(0.205)
    assert cell.tpot.mean == pytest.approx(0.05)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Sent 0.3 s late, its first token came 0.1 s after it was sent: 0.4 s for who waits."""
    cell = cell_of([record(0, lag_s=0.3, ttft_s=0.4)])
    assert cell.ttft.mean == pytest.approx(0.4)


def test_goodput_is_over_offered_requests() -> None:
    """10 offered: 6 good, 2 too late, 1 refused, 1 that failed with fast tokens."""
    records = [record(i) for i in range(6)]
    records += [record(6, ttft_s=0.3), record(7, itl_s=0.2)]
    records += [record(8, num_tokens=0, status="RESOURCE_EXHAUSTED"), record(9, status="INTERNAL")]
    cell = cell_of(records)
    assert cell.goodput == wilson(6, 10)
    assert (cell.num_offered, cell.ttft.count) == (10, 8)
    assert cell.statuses == {"OK": 8, "RESOURCE_EXHAUSTED": 1, "INTERNAL": 1}
    assert cell.outcomes == {"ok": 8, "rejected": 1, "error": 1}


def test_throughput_is_over_the_time_of_load() -> None:
    """8 requests of 3 tokens in the 10 s planned; 20 s when the last one took until then."""
    on_time = cell_of([record(i) for i in range(8)])
    assert (on_time.throughput_rps, on_time.output_tokens_per_s) == (0.8, 2.4)
    late = cell_of([*(record(i) for i in range(7)), record(7, ttft_s=12.9)])
    assert late.throughput_rps == pytest.approx(0.4)


def test_only_measured_requests_count() -> None:
    records = [record(0), record(1, phase=Phase.WARMUP, status="INTERNAL", lag_s=5.0)]
    summary = summary_of(records)
    assert summary.num_errors == 0 and summary.validity.is_valid
    assert [cell.num_offered for cell in summary.cells] == [1, 0]


def test_errors_are_counted_apart_from_refusals_deadlines_and_cancels() -> None:
    statuses = ["OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "INCOMPLETE", "NEW"]
    summary = summary_of([record(i, status=status) for i, status in enumerate(statuses)])
    assert summary.num_errors == 2
    assert summary.cells[0].outcomes == {
        "ok": 1, "rejected": 1, "deadline": 1, "cancelled": 1, "error": 2,
    }  # fmt: skip


def test_ratios_say_how_many_times_as_fast() -> None:
    """The teacher takes 3 times as long for everything, on prompts of all lengths."""
    fast = [record(i, ttft_s=0.01 * (i + 1), itl_s=0.01, num_tokens=3 + i) for i in range(30)]
    slow = [
        record(i, "teacher", ttft_s=0.03 * (i + 1), itl_s=0.03, num_tokens=3 + i) for i in range(30)
    ]
    found = compare_arms(CONFIG, fast, slow)
    assert found is not None
    assert (found.arm_a, found.arm_b, found.num_pairs) == ("student", "teacher", 30)
    assert {name: each.value for name, each in found.ratios.items()} == pytest.approx(
        dict.fromkeys(
            ["ttft_p50", "ttft_p95", "itl_p50", "itl_p95", "tpot_p50", "e2e_p50", "e2e_p95",
             "output_tokens_per_s"], 3.0,
        )
    )  # fmt: skip


def test_comparison_has_the_pairs_that_both_arms_ended() -> None:
    a = [record(0), record(1), record(2, status="INTERNAL")]
    b = [record(0, "teacher"), record(2, "teacher"), record(3, "teacher")]
    assert [each.plan.number for pair in pair_up(a, b) for each in pair] == [0, 0]
    assert compare_arms(CONFIG, a[2:], b) is None


def test_comparison_leaves_out_what_cannot_be_compared() -> None:
    """One token each: no times between; two pairs: no p95; tokens without time: no ratio."""
    pairs = [[record(i, arm, num_tokens=1) for i in range(2)] for arm in ("student", "teacher")]
    found = compare_arms(CONFIG, *pairs)
    assert found is not None and list(found.ratios) == [
        "ttft_p50",
        "e2e_p50",
        "output_tokens_per_s",
    ]
    pairs = [[record(i, arm, itl_s=0.0) for i in range(2)] for arm in ("student", "teacher")]
    found = compare_arms(CONFIG, *pairs)
    assert found is not None and "itl_p50" not in found.ratios
    pairs = [[record(i, arm, num_tokens=0) for i in range(2)] for arm in ("student", "teacher")]
    found = compare_arms(CONFIG, *pairs)
    assert found is not None and list(found.ratios) == ["e2e_p50"]


def test_quality_of_both_arms_is_compared_request_by_request() -> None:
    student = [record(i, is_correct=i < 2) for i in range(8)]
    teacher = [record(i, "teacher", is_correct=i < 7) for i in range(8)]
    (found,) = summary_of([*student, *teacher]).comparisons
    assert found.differences["pass@1"].value == -5 / 8
    assert found.mcnemar_p == 2 / 2**5
    assert found.agreement is not None and found.agreement.value == 3 / 8


def problems(records: list[RequestRecord], *costs: BlockCost, known: Sequence[str] = ()) -> str:
    validity = summary_of(records, costs=costs, problems=known).validity
    assert validity.is_valid == (not validity.problems)
    return "; ".join(validity.problems)


def test_client_that_sends_late_makes_the_run_invalid() -> None:
    """The median takes 0.2 s, so 2 ms are allowed; of 2 records p99 is 0.99 of the way up."""
    assert not problems([record(0), record(1, lag_s=0.00202)])
    late = problems([record(0), record(1, lag_s=0.0022)])
    assert "student at load 1: requests were sent 2.18 ms late at p99, more than 2 ms" in late


def test_fast_server_is_allowed_a_millisecond() -> None:
    on_time, late = (record(0, lag_s=lag_s, ttft_s=0.001, itl_s=0.0) for lag_s in (9e-4, 11e-4))
    assert not problems([on_time])
    assert "late at p99, more than 1 ms" in problems([late])


def test_slow_arm_does_not_excuse_lag_towards_a_fast_one() -> None:
    slow = [record(i, "teacher", ttft_s=10.0) for i in range(9)]
    assert "student at load 1" in problems([record(0, lag_s=0.01), *slow])


def test_busy_client_makes_the_run_invalid() -> None:
    """Blocks of the warm-up, such as 7, do not count."""
    idle = [BlockCost(0, 0, 0.8), BlockCost(0, 7, 0.99)]
    assert not problems([record(0)], *idle)
    busy = problems([record(0)], *idle, BlockCost(1, 0, 0.81))
    assert busy.startswith("a client process used 81% of a core, more than 80%")
    assert summary_of([record(0)], costs=idle).validity.max_client_cpu_share == 0.8


def test_closed_loop_that_ran_out_of_requests_is_invalid() -> None:
    out = BlockCost(0, 0, 0.1, has_run_out=True)
    assert problems([record(0)], out).startswith("in 1 blocks the closed loop had sent all")


def test_run_that_measured_nothing_or_was_interrupted_is_invalid() -> None:
    assert problems([]) == "no request was measured"
    assert problems([record(0)], known=["it was interrupted"]) == "it was interrupted"


def test_closed_loop_has_no_lag_and_its_concurrency_as_load() -> None:
    summary = summary_of([record(0, rate_rps=None, concurrency=4, lag_s=3.0)])
    assert summary.validity.send_lag_p99_s is None and summary.validity.is_valid
    assert summary.loads == (4.0,)


def test_summary_survives_its_json() -> None:
    records = [record(i, arm, is_correct=i % 2 == 0) for arm in CONFIG.arms for i in range(25)]
    summary = summary_of(records)
    assert from_json(to_json(summary)) == summary
    assert summary.cell("student", 1.0) == summary.cells[0] and summary.cell("x", 1.0) is None
    (quality,) = {cell.quality.pass_at_k[1] for cell in summary.cells if cell.quality}
    assert isinstance(quality, Estimate) and quality.value == 13 / 25


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule_sha256"):
        from_json('{"config": {}}')
