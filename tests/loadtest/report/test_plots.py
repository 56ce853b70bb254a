from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from estimators.estimate import Estimate
from loadtest.report.plots import (
    MAX_MARKED_POINTS,
    ArmHistogram,
    Curve,
    CurvePanel,
    HistogramPanel,
    Point,
    arm_styles,
    draw_curves,
    draw_histograms,
    draw_tradeoff,
)
from report.pareto import ParetoPoint
from report.svg import BLUE, VERMILION

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
STYLES = arm_styles(("student", "teacher"))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def styled(svg: str, tag: str, *words: str) -> list[ElementTree.Element]:
    """Return the elements whose style has all the words."""
    return [
        element
        for element in ElementTree.fromstring(svg).iter(f"{SVG}{tag}")
        if all(word in element.attrib.get("style", "") for word in words)
    ]


def curve(arm: str, values: dict[float, float], quantity: str = "") -> Curve:
    return Curve(arm, tuple(Point(x, y, y - 1, y + 1) for x, y in values.items()), quantity)


def draw(*curves: Curve, ticks: tuple[float, ...] = ()) -> str:
    return draw_curves(
        "plot", [CurvePanel("title", "load", "ms", curves, ticks, (0.0, None))], STYLES
    )


def numbers(svg: str) -> list[float]:
    return [float(text) for text in texts(svg) if re.fullmatch(r"[\d.]+", text)]


# --- arms


@pytest.mark.parametrize(
    "arms", [("student", "teacher"), ("teacher", "student"), ("a", "student", "b", "teacher")]
)
def test_student_and_teacher_look_the_same_in_every_run(arms: tuple[str, ...]) -> None:
    styles = arm_styles(arms)
    assert (styles["student"].color, styles["student"].marker) == (BLUE, "o")
    assert (styles["teacher"].color, styles["teacher"].marker) == (VERMILION, "s")


@pytest.mark.parametrize("arms", [("a", "b", "c", "d"), ("a", "b", "c", "student"), ("student",)])
def test_arms_differ_in_colour_and_in_marker(arms: tuple[str, ...]) -> None:
    styles = arm_styles(arms)
    assert tuple(styles) == arms
    assert len({style.color for style in styles.values()}) == len(arms)
    assert len({style.marker for style in styles.values()}) == len(arms)
    assert [style.place for style in styles.values()] == list(range(len(arms)))


# --- curves


def test_curves_are_named_in_a_legend_and_frames_on_top() -> None:
    svg = draw(curve("student", {1: 5}, "p50"), curve("teacher", {1: 6}, "p95"))
    assert {"student p50", "teacher p95", "title", "load", "ms"} <= set(texts(svg))


def test_axis_reaches_every_value_and_the_end_of_its_interval() -> None:
    svg = draw(Curve("student", (Point(1, 400, 390, 980), Point(2, 410))), ticks=(1.0, 2.0))
    assert max(numbers(svg)) >= 800


def test_equal_values_of_two_arms_stand_beside_each_other() -> None:
    svg = draw(curve("student", {1: 5, 2: 5}), curve("teacher", {1: 5, 2: 5}), ticks=(1.0, 2.0))
    student, teacher = (
        [e for e in styled(svg, "use", f"fill: {color.lower()}") if "y" in e.attrib]
        for color in (BLUE, VERMILION)
    )
    places = [{(e.attrib["x"], e.attrib["y"]) for e in each} for each in (student, teacher)]
    assert all(places) and not places[0] & places[1]


def test_only_later_quantities_are_hollow_and_dashed() -> None:
    svg = draw(curve("student", {1: 5, 2: 6}, "p50"), curve("student", {1: 8, 2: 9}, "p95"))
    assert styled(svg, "use", "fill: #ffffff", f"stroke: {BLUE.lower()}")
    assert styled(svg, "use", f"fill: {BLUE.lower()}")
    lines = styled(svg, "path", f"stroke: {BLUE.lower()}", "stroke-dasharray")
    assert len(lines) == 2, "the line and its legend"


def test_what_is_not_finite_is_not_drawn() -> None:
    finite = Point(2, 5, 4, 6)
    points = (Point(1, math.nan), finite, Point(3, math.inf))
    ticks = (1.0, 2.0, 3.0)
    only = draw(Curve("student", (finite,)), ticks=ticks)
    assert draw(Curve("student", points), ticks=ticks) == only
    assert only != draw(Curve("student", ()), ticks=ticks)


def test_many_points_are_a_line_with_a_band() -> None:
    few = draw(curve("student", dict.fromkeys(range(MAX_MARKED_POINTS), 5)))
    many = draw(curve("student", dict.fromkeys(range(MAX_MARKED_POINTS + 1), 5)))
    assert not styled(few, "path", "fill-opacity: 0.18")
    assert not styled(few, "use", "fill-opacity: 0.18")
    assert "fill-opacity: 0.18" in many


def test_loads_are_the_ticks_and_those_too_close_go_unnamed() -> None:
    shown = texts(draw(curve("student", {1: 5, 1.01: 5, 2: 5}), ticks=(1.0, 1.01, 2.0)))
    assert {"1", "2"} <= set(shown)
    assert "1.01" not in shown


def test_values_far_apart_get_a_logarithmic_axis_with_several_numbers() -> None:
    shown = set(texts(draw(Curve("student", (Point(1, 15), Point(2, 450))))))
    assert {"20", "50", "100", "200"} <= shown
    assert not any("$" in text for text in shown), "no formulas"


# --- histograms


def test_histogram_shows_shares_and_leaves_empty_ones_out() -> None:
    panel = HistogramPanel(
        "1 rps",
        "ms",
        (
            ArmHistogram("student", (1.0, 10.0, 100.0), (100, 300)),
            ArmHistogram("teacher", (1.0, 10.0, 100.0), (0, 0)),
        ),
    )
    svg = draw_histograms("itl", [panel], STYLES)
    assert {"1 rps", "share, %", "student", "teacher", "1", "10", "100"} <= set(texts(svg))
    assert 60 in numbers(svg) and max(numbers(svg)) == 100, "the axes end with 75 % and 100 ms"
    assert not styled(svg, "path", f"stroke: {VERMILION.lower()}", "fill: none")


# --- latency against quality


def test_tradeoff_has_an_arm_line_and_a_label_for_each_load() -> None:
    points = {
        arm: [
            ParetoPoint(f"{load} rps", Estimate(100 + load, 90, 120), Estimate(0.4), color, "o")
            for load in (1, 2, 4)
        ]
        for arm, color in (("student", BLUE), ("teacher", VERMILION))
    }
    svg = draw_tradeoff(points, ("latency", "pass@1"), STYLES)
    assert [texts(svg).count(f"{load} rps") for load in (1, 2, 4)] == [2, 2, 2]
    assert {"student", "teacher", "latency", "pass@1"} <= set(texts(svg))
