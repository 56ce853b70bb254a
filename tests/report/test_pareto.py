from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from estimators.estimate import Estimate
from report.pareto import ParetoPoint, draw_pareto, ends_of
from tests.support.pages import SVG, texts_of


def point(label: str, x: float, y: float = 0.3, **looks: object) -> ParetoPoint:
    return ParetoPoint(label, Estimate(x), Estimate(y), "#0072B2", "o", **looks)  # type: ignore[arg-type]


def draw(*points: ParetoPoint) -> str:
    return draw_pareto(points, ("time", "KL"))


def label_box(svg: str, label: str) -> tuple[float, float, float]:
    """Return a label's left, right and height, at a width of 5.5 points per letter."""
    (text,) = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.text == label]
    x, y = float(text.attrib["x"]), float(text.attrib["y"])
    width = 5.5 * len(label)
    is_end = "text-anchor: end" in text.attrib["style"]
    return (x - width, x, y) if is_end else (x, x + width, y)


def test_labels_of_points_that_nearly_coincide_do_not_overlap() -> None:
    points = [point(name, 1 + 1e-5 * i) for i, name in enumerate(("alpha", "beta", "gamma", "d"))]
    svg = draw(*points, point("far", 9))
    boxes = [label_box(svg, each.label) for each in points]
    for index, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[:index]:
            assert abs(y - other_y) >= 9 or right < other_left or other_right < left, boxes


def test_only_points_that_say_so_are_hollow() -> None:
    svg = draw(point("a", 1), point("b", 2, is_filled=False), point("c", 3))
    uses = [use.attrib.get("style", "") for use in ElementTree.fromstring(svg).iter(f"{SVG}use")]
    assert sum("fill: none" in style or "fill-opacity: 0" in style for style in uses) == 1


def test_axes_and_points_are_named() -> None:
    assert {"time", "KL", "a", "b"} <= set(texts_of(draw(point("a", 1), point("b", 2))))


def test_point_with_an_interval_has_bars_and_another_has_none() -> None:
    wide = ParetoPoint("a", Estimate(1, 0.5, 2), Estimate(0.3, 0.2, 0.4), "#0072B2", "o")
    bare, barred = (draw(each).count("stroke: #0072b2") for each in (point("a", 1), wide))
    assert bare == 2 and barred > 2, "the marker, in its definition and its place"


@pytest.mark.parametrize(
    ("estimate", "ends"),
    [
        (Estimate(3.0, 2.0, 5.0), (2.0, 5.0)),
        (Estimate(3.0), (3.0, 3.0)),
        (Estimate(3.0, 2.0, math.inf), (2.0, 3.0)),
        (Estimate(3.0, 3.5, 5.0), (3.0, 5.0)),
    ],
)
def test_ends_lie_around_the_value_and_are_finite(
    estimate: Estimate, ends: tuple[float, float]
) -> None:
    assert ends_of(estimate) == ends
