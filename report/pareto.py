"""Two quantities of several candidates against each other: what is fast, and what is good."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.transforms import Bbox

from estimators.estimate import Estimate
from report.svg import GREY, draw_svg, move_to_free_place

_POINT_RADIUS_PT = 8


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A candidate, its two quantities with their intervals, and how it looks."""

    label: str
    x: Estimate
    y: Estimate
    color: str
    marker: str
    size_pt: float = 7.0
    is_filled: bool = True


def draw_pareto(
    points: Sequence[ParetoPoint],
    axis_names: tuple[str, str],
    dress: Callable[[Any], Sequence[Any]] = lambda axes: (),
) -> str:
    """Draw the points with their intervals, each labelled; all values must be finite.

    `dress` draws what else belongs on the axes, and returns the texts that labels must not cover.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        axes.margins(0.15, 0.22)
        for point in points:
            axes.errorbar(
                point.x.value, point.y.value,
                xerr=errors_of([point.x]) if point.x.interval else None,
                yerr=errors_of([point.y]) if point.y.interval else None,
                fmt=point.marker, color=point.color, markersize=point.size_pt, linestyle="none",
                markerfacecolor=point.color if point.is_filled else "none",
                elinewidth=1.0, capsize=2.5, zorder=3,
            )  # fmt: skip
        _label(axes, points, dress(axes))

    return draw_svg("pareto", 4.6, paint)


def errors_of(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the ends of the intervals are below and above the values; 0 without ends."""
    ends = [ends_of(estimate) for estimate in estimates]
    return [
        [each.value - low for each, (low, _) in zip(estimates, ends, strict=True)],
        [high - each.value for each, (_, high) in zip(estimates, ends, strict=True)],
    ]


def ends_of(estimate: Estimate) -> tuple[float, float]:
    """Return the interval's ends around the value, which stands for those that are not finite."""
    low, high = (
        estimate.value if end is None or not math.isfinite(end) else end
        for end in (estimate.low, estimate.high)
    )
    return min(low, estimate.value), max(high, estimate.value)


def _label(axes: Any, points: Sequence[ParetoPoint], others: Sequence[Any]) -> None:
    """Write each point's label near it, clear of the points, of each other and of `others`."""
    axes.figure.draw_without_rendering()  # settles where the points are
    centers = axes.transData.transform([(point.x.value, point.y.value) for point in points])
    taken = [
        Bbox.from_extents(*(center - _POINT_RADIUS_PT), *(center + _POINT_RADIUS_PT))
        for center in centers
    ]
    taken += [other.get_window_extent() for other in others]
    heights = [sign * dy for dy in range(9, 120, 8) for sign in (1, -1)]
    places = [(dx, dy) for dy in heights for dx in (9, -9)]
    for point in points:
        place = (point.x.value, point.y.value)
        text = axes.annotate(
            point.label, place, (0, 0), textcoords="offset points", va="center",
            color=point.color, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )  # fmt: skip
        move_to_free_place(text, places, taken, within=axes.bbox)
        axes.annotate(
            "", place, text.get_position(), textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
        )  # fmt: skip
