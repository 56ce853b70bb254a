"""The load test's plots: plain values in, one inline `<svg>` element out.

An arm keeps its colour and its marker through all plots of a page. Where few loads are compared,
the arms' points stand a little beside each other, so that equal values hide nothing. What is NaN or
infinite is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from estimators.estimate import Estimate
from report.pareto import ParetoPoint, draw_pareto, ends_of, errors_of
from report.svg import BLUE, GREEN, PURPLE, VERMILION, draw_svg, scale_axis, shorten

MAX_COLUMNS = 3
MAX_MARKED_POINTS = 12  # a curve of more is a line with a band
LINE_STYLES = ("-", "--", ":")
DODGE_PT = 5.0


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How an arm looks, whatever is drawn of it; `place` is among the arms, from 0."""

    color: str
    marker: str
    place: int


@dataclass(frozen=True, slots=True)
class Point:
    """A value with the ends of its 95 % interval, where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.y, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Curve:
    """What an arm did over x. Curves of the same arm differ in `quantity`, such as p50 and p95."""

    arm: str
    points: tuple[Point, ...]
    quantity: str = ""


@dataclass(frozen=True, slots=True)
class CurvePanel:
    """One frame of a plot; several share a legend. `x_ticks` none: wherever they fit."""

    title: str
    x_name: str
    y_name: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[float, ...] = ()
    y_limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class ArmHistogram:
    """Counts of an arm in bins; `edges` is one longer than `counts`."""

    arm: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HistogramPanel:
    """The arms' histograms at one load, as shares."""

    title: str
    x_name: str
    histograms: tuple[ArmHistogram, ...]


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """Return each arm's looks: student and teacher always their own, others in turn."""
    known = {"student": (BLUE, "o"), "teacher": (VERMILION, "s")}
    free = [look for name, look in known.items() if name not in arms]
    others = iter([(GREEN, "^"), (PURPLE, "D"), *free])
    looks = [known[arm] if arm in known else next(others) for arm in arms]
    return {
        arm: ArmStyle(*look, place)
        for place, (arm, look) in enumerate(zip(arms, looks, strict=True))
    }


def draw_curves(svg_name: str, panels: Sequence[CurvePanel], styles: Mapping[str, ArmStyle]) -> str:
    """Draw the panels side by side, at most MAX_COLUMNS in a row."""

    def paint(axes: Any, panel: CurvePanel) -> None:
        axes.set_ylabel(panel.y_name)
        for curve in panel.curves:
            _paint_curve(axes, curve, styles, line_style_of(panel.curves, curve))
        _set_loads(axes, panel.x_ticks)
        scale_axis(axes, "y", [point.y for curve in panel.curves for point in curve.points])
        low, high = panel.y_limits
        if axes.get_yscale() == "linear":
            axes.set_ylim(low, high)

    curves = [curve for panel in panels for curve in panel.curves]
    return _draw_panels(svg_name, panels, paint, curve_legend(curves, styles))


def draw_histograms(
    svg_name: str, panels: Sequence[HistogramPanel], styles: Mapping[str, ArmStyle]
) -> str:
    """Draw shares per bin over a logarithmic axis; all edges are positive."""

    def paint(axes: Any, panel: HistogramPanel) -> None:
        axes.set_ylabel("share, %")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        for histogram in panel.histograms:
            total = sum(histogram.counts)
            shares = [100 * count / total for count in histogram.counts] if total else []
            if shares:
                color = styles[histogram.arm].color
                axes.stairs(shares, histogram.edges, color=color, linewidth=1.5)
                axes.stairs(shares, histogram.edges, color=color, alpha=0.15, fill=True)
        axes.set_ylim(bottom=0)

    arms = dict.fromkeys(h.arm for panel in panels for h in panel.histograms)
    handles = [Patch(color=styles[arm].color, label=shorten(arm)) for arm in arms]
    return _draw_panels(svg_name, panels, paint, handles)


def draw_tradeoff(
    points: Mapping[str, Sequence[ParetoPoint]],
    axis_names: tuple[str, str],
    styles: Mapping[str, ArmStyle],
) -> str:
    """Draw latency against quality; the points of an arm are joined in the order given."""
    xs = [point.x.value for mine in points.values() for point in mine]

    def dress(axes: Any) -> Sequence[Any]:
        for arm, mine in points.items():
            line = [(point.x.value, point.y.value) for point in mine]
            axes.plot(*zip(*line, strict=True), color=styles[arm].color, linewidth=1.0)
        scale_axis(axes, "x", xs)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.03 * axes.get_ylim()[1]))
        add_legend(axes.figure, curve_legend([Curve(arm, ()) for arm in points], styles))
        return ()

    return draw_pareto([point for mine in points.values() for point in mine], axis_names, dress)


def _draw_panels(
    svg_name: str,
    panels: Sequence[Any],
    paint_panel: Callable[[Any, Any], None],
    handles: Sequence[Any],
) -> str:
    num_columns = min(MAX_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)

    def paint(figure: Any) -> None:
        grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            axes.set_title(panel.title, fontsize=10, loc="left")
            axes.set_xlabel(panel.x_name)
            paint_panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.remove()
        add_legend(figure, handles)
        _thin_ticks(figure)

    return draw_svg(svg_name, 0.5 + 2.7 * num_rows, paint)


def _paint_curve(axes: Any, curve: Curve, styles: Mapping[str, ArmStyle], line_style: str) -> None:
    style = styles[curve.arm]
    points = [point for point in curve.points if math.isfinite(point.y)]
    xs, ys = [point.x for point in points], [point.y for point in points]
    if len(points) > MAX_MARKED_POINTS:
        lows, highs = zip(*(ends_of(point.estimate) for point in points), strict=True)
        axes.plot(xs, ys, line_style, color=style.color, linewidth=1.4)
        axes.fill_between(xs, lows, highs, color=style.color, alpha=0.18, linewidth=0)
        return
    estimates = [point.estimate for point in points]
    axes.errorbar(
        xs, ys, yerr=errors_of(estimates), fmt=style.marker, linestyle=line_style,
        color=style.color, markersize=5, linewidth=1.4, elinewidth=1.0, capsize=2.5,
        markerfacecolor=_face(style, line_style),
        transform=axes.transData + _dodge(axes, style, len(styles)),
    )  # fmt: skip
    # What is drawn beside its place does not count towards the limits.
    ends = map(ends_of, estimates)
    axes.update_datalim([(x, end) for x, both in zip(xs, ends, strict=True) for end in both])
    axes.autoscale_view()


def _face(style: ArmStyle, line_style: str) -> str:
    """Return what fills a marker: of all quantities but the first nothing, as lines may lack."""
    return style.color if line_style == LINE_STYLES[0] else "white"


def _dodge(axes: Any, style: ArmStyle, num_arms: int) -> Any:
    """Return the shift, to the side alone, that keeps the arms' points apart."""
    offset_pt = DODGE_PT * (style.place - (num_arms - 1) / 2)
    return ScaledTranslation(offset_pt / 72, 0, axes.figure.dpi_scale_trans)


def line_style_of(curves: Sequence[Curve], curve: Curve) -> str:
    quantities = list(dict.fromkeys(curve.quantity for curve in curves))
    return LINE_STYLES[quantities.index(curve.quantity) % len(LINE_STYLES)]


def _set_loads(axes: Any, ticks: Sequence[float]) -> None:
    """Put the ticks at the loads; loads that double and double stand at equal distances."""
    if not ticks:
        return
    if min(ticks) > 0 and max(ticks) >= 6 * min(ticks):
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.margins(x=0.12)


def _thin_ticks(figure: Any) -> None:
    """Hide the tick labels that would cover the one before them."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        right = -math.inf
        for label in axes.get_xticklabels():
            box = label.get_window_extent()
            if (
                not label.get_text()
                or not axes.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1 + 1
            ):
                continue
            if box.x0 < right + 3:
                label.set_visible(False)
            else:
                right = box.x1


def curve_legend(curves: Sequence[Curve], styles: Mapping[str, ArmStyle]) -> list[Any]:
    named = {(curve.arm, curve.quantity): curve for curve in curves}
    return [
        Line2D(
            [], [], color=styles[arm].color, marker=styles[arm].marker, markersize=5,
            linestyle=line_style_of(curves, curve), label=shorten(f"{arm} {quantity}".strip()),
            markerfacecolor=_face(styles[arm], line_style_of(curves, curve)),
        )
        for (arm, quantity), curve in named.items()
    ]  # fmt: skip


def add_legend(figure: Any, handles: Sequence[Any]) -> None:
    if handles:
        figure.legend(
            handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False
        )
