"""From a run's summary and records to the report's plots, by name; what has no data has no plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from estimators.estimate import Estimate
from loadtest.analysis.summary import Cell, Distribution, Summary
from loadtest.analysis.summary import Histogram as Bins
from loadtest.records import RequestRecord
from loadtest.report.plots import (
    ArmHistogram,
    ArmStyle,
    Curve,
    CurvePanel,
    HistogramPanel,
    Point,
    draw_curves,
    draw_histograms,
    draw_tradeoff,
)
from loadtest.report.timeline import Gauge, draw_timeline, load_starts, tracks_of, turns_of
from report.pareto import ParetoPoint

NATS = "nats per token"
PASS_AT_1 = "pass@1, %"
KL_TO_TEACHER = f"KL(arm ‖ teacher), {NATS}"
TEACHER = "teacher"
LATENCIES: tuple[tuple[str, Callable[[Cell], Distribution]], ...] = (
    ("time to first token", lambda cell: cell.ttft),
    ("between tokens", lambda cell: cell.itl),
    ("end to end", lambda cell: cell.e2e),
)

Styles = Mapping[str, ArmStyle]


def draw_plots(
    summary: Summary, records: Sequence[RequestRecord], gauges: Sequence[Gauge], styles: Styles
) -> dict[str, str]:
    """Return the plots that there is data for, as `<svg>` elements by name."""
    plots = {}
    if points := pareto_points(summary, styles):
        axis_names = ("median end-to-end latency, ms", pareto_quality(summary))
        plots["pareto"] = draw_tradeoff(points, axis_names, styles)
    for name, panels in (
        ("latency", _latency_panels(summary)),
        ("goodput", _goodput_panels(summary)),
        ("kl_position", _position_panels(summary)),
        ("pass_at_k", _pass_panels(summary)),
    ):
        if any(curve.points for panel in panels for curve in panel.curves):
            plots[name] = draw_curves(name.replace("_", ""), panels, styles)
    gaps = _histogram_panels(summary, "ms", lambda cell: cell.itl_histogram, 1e3)
    divergences = _histogram_panels(summary, f"k3, {NATS}", _kl_bins, 1.0)
    for name, histograms in (("itl", gaps), ("kl", divergences)):
        if histograms:
            plots[name] = draw_histograms(name, histograms, styles)
    if records:
        loads = [(start_s, load_label(summary, rate)) for start_s, rate in load_starts(records)]
        plots["timeline"] = draw_timeline(
            tracks_of(records, gauges), turns_of(records), loads, styles
        )
    return plots


def load_label(summary: Summary, load: float) -> str:
    return f"concurrency {load:g}" if is_closed(summary) else f"{load:g} rps"


def is_closed(summary: Summary) -> bool:
    return summary.config.get("arrival") == "closed"


def pareto_quality(summary: Summary) -> str:
    """Return what the Pareto plot's y axis shows: pass@1, or the KL where nothing was judged."""
    is_judged = any(1 in cell.quality.pass_at_k for cell in summary.cells if cell.quality)
    return PASS_AT_1 if is_judged else KL_TO_TEACHER


def pareto_points(summary: Summary, styles: Styles) -> dict[str, list[ParetoPoint]]:
    """Return, by arm, a point per load of which latency (ms) and quality are known."""
    quality_of = _pass_at_1 if pareto_quality(summary) == PASS_AT_1 else _kl_to_teacher
    points: dict[str, list[ParetoPoint]] = {}
    for cell in summary.cells:
        latency, quality = _scaled(cell.e2e.p50, 1e3), quality_of(cell)
        if latency and quality:
            style = styles[cell.arm]
            points.setdefault(cell.arm, []).append(
                ParetoPoint(
                    load_label(summary, cell.load), latency, quality, style.color, style.marker
                )
            )
    # The teacher's KL to itself says nothing alone.
    is_measured = quality_of is _pass_at_1 or bool(points.keys() - {TEACHER})
    return points if is_measured else {}


def _pass_at_1(cell: Cell) -> Estimate | None:
    return _scaled(cell.quality.pass_at_k.get(1), 100) if cell.quality else None


def _kl_to_teacher(cell: Cell) -> Estimate | None:
    if cell.arm == TEACHER:
        return Estimate(0.0)
    return _scaled(cell.quality.exact_kl or cell.quality.k3) if cell.quality else None


def _latency_panels(summary: Summary) -> list[CurvePanel]:
    """Return a panel per latency with the arms' p50 and p95 over load, in ms."""
    return [
        CurvePanel(title, _load_name(summary), "ms", curves, summary.loads, (0.0, None))
        for title, distribution in LATENCIES
        if (curves := _percentile_curves(summary, distribution))
    ]


def _percentile_curves(
    summary: Summary, distribution: Callable[[Cell], Distribution]
) -> tuple[Curve, ...]:
    return tuple(
        _curve(summary, arm, lambda cell: distribution(cell).p50, 1e3, "p50")
        for arm in arms_of(summary)
    ) + tuple(
        _curve(summary, arm, lambda cell: distribution(cell).p95, 1e3, "p95")
        for arm in arms_of(summary)
    )


def _goodput_panels(summary: Summary) -> list[CurvePanel]:
    curves = tuple(_curve(summary, arm, lambda cell: cell.goodput, 100) for arm in arms_of(summary))
    return [
        CurvePanel(
            "", _load_name(summary), "good, % of offered", curves, summary.loads, (-3.0, 103.0)
        )
    ]


def _position_panels(summary: Summary) -> list[CurvePanel]:
    def curve(cell: Cell) -> Curve:
        positions = cell.quality.k3_by_position if cell.quality else ()
        return Curve(cell.arm, _points(enumerate(positions, start=1)))

    return _panels_per_load(summary, "token of the answer", f"k3, {NATS}", curve)


def _pass_panels(summary: Summary) -> list[CurvePanel]:
    def curve(cell: Cell) -> Curve:
        estimates = cell.quality.pass_at_k if cell.quality else {}
        return Curve(cell.arm, _points(sorted(estimates.items()), 100))

    ks = sorted({k for cell in summary.cells if cell.quality for k in cell.quality.pass_at_k})
    return _panels_per_load(summary, "k", "pass@k, %", curve, ks)


def _panels_per_load(
    summary: Summary,
    x_name: str,
    y_name: str,
    curve: Callable[[Cell], Curve],
    ticks: Sequence[float] = (),
) -> list[CurvePanel]:
    panels = []
    for load in summary.loads:
        curves = tuple(curve(cell) for cell in summary.cells if cell.load == load)
        title = load_label(summary, load)
        panels.append(CurvePanel(title, x_name, y_name, curves, tuple(ticks), (0.0, None)))
    return [panel for panel in panels if any(curve.points for curve in panel.curves)]


def _curve(
    summary: Summary,
    arm: str,
    estimate: Callable[[Cell], Estimate | None],
    factor: float,
    quantity: str = "",
) -> Curve:
    cells = sorted((c for c in summary.cells if c.arm == arm), key=lambda cell: cell.load)
    return Curve(arm, _points(((c.load, estimate(c)) for c in cells), factor), quantity)


def _points(
    values: Iterable[tuple[float, Estimate | None]], factor: float = 1.0
) -> tuple[Point, ...]:
    scaled = ((x, _scaled(estimate, factor)) for x, estimate in values)
    return tuple(Point(x, found.value, found.low, found.high) for x, found in scaled if found)


def _scaled(estimate: Estimate | None, factor: float = 1.0) -> Estimate | None:
    """Return an estimate times the factor; None without a finite value."""
    if estimate is None or not math.isfinite(estimate.value):
        return None
    low, high = (None if end is None else factor * end for end in (estimate.low, estimate.high))
    return Estimate(factor * estimate.value, low, high)


def _histogram_panels(
    summary: Summary, x_name: str, bins: Callable[[Cell], Bins | None], factor: float
) -> list[HistogramPanel]:
    panels = []
    for load in summary.loads:
        found = [(cell.arm, bins(cell)) for cell in summary.cells if cell.load == load]
        histograms = tuple(
            ArmHistogram(arm, _log_edges(of.edges, factor), of.counts)
            for arm, of in found
            if of is not None and any(of.counts)
        )
        if histograms:
            panels.append(HistogramPanel(load_label(summary, load), x_name, histograms))
    return panels


def _kl_bins(cell: Cell) -> Bins | None:
    return cell.quality.k3_histogram if cell.quality else None


def _log_edges(edges: Sequence[float], factor: float) -> tuple[float, ...]:
    """Return positive edges: the first bin, of all that is smaller, as wide as the next one."""
    first = edges[1] ** 2 / edges[2] if len(edges) > 2 else edges[1] / 2
    return tuple(factor * edge for edge in (first, *edges[1:]))


def arms_of(summary: Summary) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cell.arm for cell in summary.cells))


def _load_name(summary: Summary) -> str:
    return "concurrency per arm" if is_closed(summary) else "requests/s per arm"
