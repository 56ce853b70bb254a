from __future__ import annotations

import math

import pytest

from estimators.estimate import Estimate
from loadtest.analysis.summary import Cell, Distribution, Histogram, Quality, Summary
from loadtest.report.plot_data import (
    KL_TO_TEACHER,
    PASS_AT_1,
    draw_plots,
    load_label,
    pareto_points,
    pareto_quality,
)
from loadtest.report.plots import arm_styles
from tests.support.load_tests import cell_of, quality_of, summary_of

STYLES = arm_styles(("student", "teacher"))


def estimate(value: float, low: float | None = None, high: float | None = None) -> Estimate:
    return Estimate(value, low, high, 9)


def ends(found: Estimate) -> tuple[float, float | None, float | None]:
    return found.value, found.low, found.high


def cell(arm: str, load: float, found: Quality | None, p50_s: Estimate | None = None) -> Cell:
    e2e = Distribution(9, 0.2, p50_s or estimate(0.2, 0.1, 0.3), None, None, None)
    return cell_of(arm, load, e2e=e2e, quality=found)


def summary(*cells: Cell, arrival: str = "poisson") -> Summary:
    return summary_of(*cells, config={"arrival": arrival})


def test_pareto_shows_pass_at_1_in_percent_and_latency_in_milliseconds() -> None:
    judged = quality_of(pass_at_k={1: estimate(0.4, 0.3, 0.5)}, exact_kl=estimate(0.2))
    result = summary(cell("student", 2, judged))
    assert pareto_quality(result) == PASS_AT_1
    ((arm, (point,)),) = pareto_points(result, STYLES).items()
    assert (arm, point.label, point.color) == ("student", "2 rps", STYLES["student"].color)
    assert ends(point.x) == pytest.approx((200, 100, 300))
    assert ends(point.y) == pytest.approx((40, 30, 50))


@pytest.mark.parametrize("kind", ["exact_kl", "k3"])
def test_pareto_falls_back_to_the_kl_with_the_teacher_at_0(kind: str) -> None:
    far = quality_of(**{kind: estimate(0.2, 0.1, 0.3)})
    result = summary(cell("student", 1, far), cell("teacher", 1, quality_of(k3=estimate(0.9))))
    assert pareto_quality(result) == KL_TO_TEACHER
    found = pareto_points(result, STYLES)
    assert ends(found["student"][0].y) == (0.2, 0.1, 0.3)
    assert ends(found["teacher"][0].y) == (0.0, None, None)


def test_exact_kl_is_preferred_to_its_estimate() -> None:
    both = quality_of(exact_kl=estimate(0.2), k3=estimate(0.3))
    (point,) = pareto_points(summary(cell("student", 1, both)), STYLES)["student"]
    assert point.y.value == 0.2


def test_teacher_alone_has_no_kl_to_show() -> None:
    assert pareto_points(summary(cell("teacher", 1, None)), STYLES) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_point_without_a_finite_latency_or_quality_is_left_out(value: float) -> None:
    good = quality_of(pass_at_k={1: estimate(0.4)})
    bad = quality_of(pass_at_k={1: estimate(value)})
    result = summary(
        cell("a", 1, good), cell("b", 1, bad), cell("c", 1, good, estimate(value)),
        cell("d", 1, None),
    )  # fmt: skip
    assert list(pareto_points(result, arm_styles("abcd"))) == ["a"]


@pytest.mark.parametrize(
    ("arrival", "expected"),
    [("poisson", "2.5 rps"), ("trace", "2.5 rps"), ("closed", "concurrency 2.5")],
)
def test_load_is_labelled_by_how_it_comes(arrival: str, expected: str) -> None:
    assert load_label(summary(arrival=arrival), 2.5) == expected


def test_only_what_has_data_is_drawn() -> None:
    styles = arm_styles(("student",))
    assert draw_plots(summary(), [], [], styles) == {}
    judged = quality_of(k3_by_position=(estimate(0.1), estimate(0.2)))
    found = draw_plots(summary(cell("student", 1, judged)), [], [], styles)
    assert set(found) == {"latency", "kl_position"}


def test_first_bin_of_a_histogram_shows_though_it_begins_at_0() -> None:
    histogram = Histogram((0.0, 0.001, 0.01, 0.1), (5, 0, 5))
    judged = quality_of(k3_histogram=histogram)
    svg = draw_plots(summary(cell("student", 1, judged)), [], [], arm_styles(("student",)))["kl"]
    assert ">0.0001<" in svg.replace("\n", ""), "one bin's width below the first edge above 0"
