"""The page of text: warnings first, then what was found, and nothing made up."""

from __future__ import annotations

import dataclasses

import pytest

from estimators.estimate import Estimate
from loadtest.analysis.summary import ArmComparison, Distribution, Summary, Validity
from loadtest.report.summary_text import describe_failures, to_markdown
from report.formats import NBSP
from tests.support.load_tests import cell_of, quality_of, summary_of

TTFT = Distribution(40, 0.02, Estimate(0.0123, 0.011, 0.0145, 40), None, None, None)
QUALITY = quality_of(pass_at_k={1: Estimate(0.25, 0.1, 0.4, 40)}, k3=Estimate(0.5))
CELL = cell_of(
    "student", 2.0, ttft=TTFT, throughput_rps=3.9, output_tokens_per_s=120.0, quality=QUALITY
)
COMPARISON = ArmComparison(
    2.0, "student", "teacher", 38,
    ratios={"ttft_p50": Estimate(3.1, 2.9, 3.3, 30)},
    differences={"pass@1": Estimate(-0.05, -0.09, 0.01, 38)},
    mcnemar_p=0.0625, agreement=Estimate(0.75, 0.5, 0.9, 38),
)  # fmt: skip
SUMMARY = summary_of(CELL, comparisons=(COMPARISON,))


def lines_of(summary: Summary) -> list[str]:
    return to_markdown(summary).replace(NBSP, " ").splitlines()


def test_page_says_how_much_faster_and_how_much_worse() -> None:
    lines = lines_of(SUMMARY)
    assert lines[0] == "# Load test"
    assert "## student against teacher at 2 requests/s" in lines
    assert "* ttft_p50: student is 3.1× [2.9, 3.3] as fast" in lines
    assert "* pass@1: student − teacher = −5.0 points [−9.0, +1.0]" in lines
    assert "* McNemar's p of the correctness: 0.0625" in lines
    assert "* agreement of the majorities: 75.0% [50.0%, 90.0%]" in lines


def test_tables_have_counts_and_dashes_for_what_was_not_measured() -> None:
    lines = lines_of(SUMMARY)
    assert "| student | 2 | ttft | 40 | 20 ms | 12.3 ms [11, 14.5] | – | – | – |" in lines
    assert "| student | 2 | e2e | 0 | – | – | – | – | – |" in lines
    assert "| student | 2 | 40 | 40 | 3.9 | 120 | – | 25.0% [10.0%, 40.0%] | – | 0.5 | – |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {10, 12}


def test_quality_nobody_knows_is_dashes() -> None:
    unknown = dataclasses.replace(CELL, quality=None)
    page = to_markdown(dataclasses.replace(SUMMARY, cells=(CELL, unknown)))
    assert "| student | 2 | 40 | 40 | 3.9 | 120 | – | – | – | – | – |" in page


def test_closed_loop_is_called_one() -> None:
    page = to_markdown(dataclasses.replace(SUMMARY, config={"arrival": "closed"}))
    assert "at concurrency 2 (closed loop)" in page


def test_invalid_run_and_failures_come_first() -> None:
    spoilt = dataclasses.replace(CELL, statuses={"OK": 36, "INTERNAL": 1, "RESOURCE_EXHAUSTED": 3})
    page = to_markdown(
        dataclasses.replace(
            SUMMARY, cells=(spoilt, CELL), validity=Validity(False, ("it was late",), 0.1, 0.1)
        )
    )
    assert page.splitlines()[:4] == [
        "**INVALID**: it was late.",
        "",
        "**4 of 80 requests failed: 1 errors, 3 rejections.**",
        "",
    ]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"OK": 3}, ""),
        ({"OK": 1, "DEADLINE_EXCEEDED": 2}, "2 of 40 requests failed: 2 deadlines exceeded"),
        ({"CANCELLED": 1}, "1 of 40 requests failed: 1 cancellations"),
    ],
)
def test_failures_are_told_apart(statuses: dict[str, int], expected: str) -> None:
    cell = dataclasses.replace(CELL, statuses=statuses)
    assert describe_failures(dataclasses.replace(SUMMARY, cells=(cell,))) == expected


def test_requests_that_an_interrupted_run_gave_up_have_not_failed() -> None:
    cell = dataclasses.replace(CELL, statuses={"OK": 36, "UNAVAILABLE": 1, "CANCELLED": 3})
    cut = dataclasses.replace(SUMMARY, cells=(cell,), is_interrupted=True)
    assert (cut.num_failed, describe_failures(cut)) == (1, "1 of 40 requests failed: 1 errors")
    uncut = dataclasses.replace(cut, is_interrupted=False)
    assert describe_failures(uncut) == "4 of 40 requests failed: 1 errors, 3 cancellations"
