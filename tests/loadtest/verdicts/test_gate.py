"""Limits: how they are written, which runs they let through, what they say."""

from __future__ import annotations

import dataclasses
import math

import pytest

from loadtest.analysis.metrics import is_higher_better, metrics_of
from loadtest.analysis.summary import ArmComparison, Cell, Distribution, Summary, Validity
from loadtest.verdicts.gate import Kind, LimitError, check, parse_limit, regression
from tests.support.load_tests import around, cell_of, quality_of, summary_of


def cell(arm: str, load: float, ttft_p95: float, pass_at_1: float | None = 0.25) -> Cell:
    ttft = Distribution(40, 0.1, around(0.1), None, around(ttft_p95), None)
    quality = None
    if pass_at_1 is not None:
        right = around(pass_at_1)
        quality = quality_of(pass_at_k={1: right}, majority_correct=right, exact_kl=around(0.0))
    statuses = {"OK": 30, "INTERNAL": 10}
    return cell_of(arm, load, statuses=statuses, ttft=ttft, goodput=around(0.9), quality=quality)


def summary(
    *cells: Cell,
    is_valid: bool = True,
    comparisons: tuple[ArmComparison, ...] = (),
    max_failure_rate: float = 1.0,
) -> Summary:
    validity = Validity(is_valid, () if is_valid else ("it was late",), 0.0, 0.1)
    config = {"max_failure_rate": max_failure_rate}
    return summary_of(*cells, config=config, validity=validity, comparisons=comparisons)


RUN = summary(cell("student", 1.0, 0.2), cell("student", 2.0, 0.4), cell("teacher", 1.0, 0.9))


def broken(
    text: str, kind: Kind = "max", run: Summary = RUN, base: Summary | None = None
) -> list[str]:
    return [str(each) for each in check(run, base, [parse_limit(kind, text)])]


def test_limits_hold_at_every_load() -> None:
    assert broken("student.ttft_p95=0.4") == []
    assert broken("student.ttft_p95=0.3") == ["--max student.ttft_p95=0.3: 0.4 is more at load 2"]
    assert len(broken("student.ttft_p95=0.1")) == 2


def test_limit_may_name_its_load() -> None:
    assert broken("student@1.ttft_p95=0.3") == []
    assert broken("student@2.ttft_p95=0.3") == [
        "--max student@2.ttft_p95=0.3: 0.4 is more at load 2"
    ]


def test_min_breaks_below() -> None:
    assert broken("student.pass@1=0.25", "min") == []
    assert broken("teacher.pass@1=0.26", "min") == [
        "--min teacher.pass@1=0.26: 0.25 is less at load 1"
    ]


def test_failures_and_goodput_have_limits() -> None:
    assert broken("teacher.failed_share=0.25") == []
    assert broken("teacher.failed_share=0.2") != []
    assert broken("teacher.goodput=0.91", "min") != []


@pytest.mark.parametrize("metric", ["ttft_p99", "k3", "pass@8", "speedup_ttft_p50"])
def test_what_was_not_measured_keeps_no_limit(metric: str) -> None:
    (found,) = broken(f"teacher.{metric}=9")
    assert found == f"--max teacher.{metric}=9: not measured, or with too few requests at load 1"


def test_run_without_answers_breaks_a_limit_on_them() -> None:
    run = summary(cell("student", 1.0, 0.2, pass_at_1=None))
    assert "not measured" in broken("student.pass@1=0", "min", run)[0]


def test_regression_is_a_share_of_the_baseline() -> None:
    base = summary(cell("student", 1.0, 0.19), cell("student", 2.0, 0.32))
    assert broken("student.ttft_p95=0.25", "max-regress", base=base) == []
    assert broken("student.ttft_p95=0.1", "max-regress", base=base) == [
        "--max-regress student.ttft_p95=0.1: 0.4 after 0.32 is 25.0% worse at load 2"
    ]
    better = summary(cell("student", 1.0, 0.2, 0.5), cell("student", 2.0, 0.4, 0.25))
    assert broken("student.pass@1=0.1", "max-regress", base=better) == [
        "--max-regress student.pass@1=0.1: 0.25 after 0.5 is 50.0% worse at load 1"
    ]


def test_regression_needs_the_baselines_number() -> None:
    base = summary(cell("student", 1.0, 0.2))
    assert broken("student.ttft_p95=0.1", "max-regress", base=base) == [
        "--max-regress student.ttft_p95=0.1: the baseline has not measured it at load 2"
    ]
    with pytest.raises(LimitError, match="a regression is against a --baseline"):
        broken("student.ttft_p95=0.1", "max-regress")


def test_invalid_run_breaks_every_gate() -> None:
    run = dataclasses.replace(RUN, validity=Validity(False, ("it was late",), 1.0, 0.1))
    assert [str(each) for each in check(run, None, [])] == ["the run is INVALID: it was late"]
    empty = dataclasses.replace(run, cells=())
    assert broken("student.ttft_p95=9", run=empty) == ["the run is INVALID: it was late"]
    assert broken("student.ttft_p95=9", "max-regress", base=run) == [
        "the baseline is INVALID: it was late"
    ]
    assert broken("student.ttft_p95=9", "max", base=run) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("janitor.ttft_p95=1", "no arm 'janitor'; the run has student, teacher"),
        ("student@3.ttft_p95=1", "no load 3; the run has 1, 2"),
        ("student.latency=1", "no metric 'latency'; there are ttft_p50, .*goodput.*pass@K"),
        ("student.pass@0=1", "no metric 'pass@0'"),
        ("student.ttft_p95", "write ARM.METRIC=NUMBER"),
        ("ttft_p95=1", "write ARM.METRIC=NUMBER"),
        ("student.ttft_p95=fast", "write ARM.METRIC=NUMBER"),
        ("student.ttft_p95=nan", "write ARM.METRIC=NUMBER"),
        ("student@1.2.3.ttft_p95=1", "write ARM.METRIC=NUMBER"),
    ],
)
def test_limit_that_means_nothing_is_refused(text: str, error: str) -> None:
    with pytest.raises(LimitError, match=error):
        broken(text)


def test_run_with_more_failures_than_it_may_have_breaks_every_gate() -> None:
    """Of each cell 10 of 40 requests failed."""
    of = cell("student", 1.0, 0.2)
    assert broken("student.ttft_p95=1", run=summary(of, max_failure_rate=0.25)) == []
    failing = summary(of, max_failure_rate=0.2)
    told = "10 of 40 requests failed: 10 errors; --max-failure-rate 0.2 allows fewer"
    assert broken("student.ttft_p95=1", run=failing) == [f"the run: {told}"]
    assert broken("student.ttft_p95=1", "max-regress", RUN, failing) == [f"the baseline: {told}"]
    assert broken("student.failed_share=0.25", run=failing) == []


def test_negative_regression_is_refused() -> None:
    with pytest.raises(LimitError, match="give a share of 0 or more"):
        parse_limit("max-regress", "student.ttft_p95=-0.1")


@pytest.mark.parametrize(
    ("metric", "before", "now", "expected"),
    [
        ("ttft_p95", 0.2, 0.1, -0.5),
        ("difference_pass@1", -0.1, -0.15, 0.5),
        ("exact_kl", 0.0, 0.1, math.inf),
        ("exact_kl", 0.0, 0.0, 0.0),
        ("goodput", 0.0, 0.5, -math.inf),
    ],
)
def test_regression_by_hand(metric: str, before: float, now: float, expected: float) -> None:
    assert regression(metric, before, now) == expected


def test_comparisons_are_metrics_of_their_first_arm_the_worst_of_several() -> None:
    comparisons = tuple(
        ArmComparison(1.0, "student", arm, 9, {"ttft_p50": around(speed)},
                      {"pass@1": around(-0.1)}, None, agreement)
        for arm, speed, agreement in (("teacher", 3.0, around(0.8)), ("old", 2.0, None))
    )  # fmt: skip
    found = metrics_of(summary(cell("student", 1.0, 0.2), comparisons=comparisons))
    of_student = found["student", 1.0]
    names = ("speedup_ttft_p50", "difference_pass@1", "agreement")
    assert [of_student[name] for name in names] == [around(2.0), around(-0.1), around(0.8)]
    assert all(map(is_higher_better, names)) and not is_higher_better("exact_kl")
