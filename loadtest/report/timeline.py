"""What happened when in a run: requests in flight, how late each was sent, the server's queue.

A run of any length has at most NUM_BINS points per line: a bin shows its highest value, so that no
peak is lost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from loadtest.records import Phase, RequestRecord
from loadtest.report.plots import ArmStyle, Curve, Point, add_legend, line_style_of
from report.svg import GREY, draw_svg, shorten

NUM_BINS = 600
MIN_TURN_SHARE = 0.005  # of the run: a turn of one request would not be seen


@dataclass(frozen=True, slots=True)
class ArmTurn:
    """A stretch of time, in seconds, in which an arm was sent requests."""

    arm: str
    start_s: float
    end_s: float
    is_warmup: bool = False


@dataclass(frozen=True, slots=True)
class Track:
    """A row of the timeline: values over seconds, as steps or as dots."""

    y_name: str
    curves: tuple[Curve, ...]
    is_stepped: bool = True


@dataclass(frozen=True, slots=True)
class Gauge:
    """What a server said of itself at a time: sequences waiting and running, the last batch."""

    arm: str
    time_s: float
    waiting: float
    running: float
    batch: float


def turns_of(records: Iterable[RequestRecord]) -> list[ArmTurn]:
    """Return each arm's turns, from the first request due to the last, in order of time."""
    starts: defaultdict[tuple[str, int, Phase], list[float]] = defaultdict(list)
    for record in records:
        plan = record.plan
        starts[plan.arm, plan.block, plan.phase].append(record.start_s)
    turns = [
        ArmTurn(arm, min(times), max(times), phase is Phase.WARMUP)
        for (arm, _, phase), times in starts.items()
    ]
    return sorted(turns, key=lambda turn: turn.start_s)


def load_starts(records: Iterable[RequestRecord]) -> list[tuple[float, float]]:
    """Return (seconds, load) where each measured load began."""
    starts: dict[float, float] = {}
    for record in records:
        load = record.plan.load
        if record.plan.phase is Phase.MEASURED:
            starts[load] = min(record.start_s, starts.get(load, math.inf))
    return sorted((start_s, load) for load, start_s in starts.items())


def tracks_of(records: Sequence[RequestRecord], gauges: Sequence[Gauge]) -> list[Track]:
    """Return the rows of the timeline that there is data for."""
    bin_s = max((record.ended_s for record in records), default=0.0) / NUM_BINS or 1.0
    arms = dict.fromkeys(record.plan.arm for record in records)
    by_arm = {arm: [r for r in records if r.plan.arm == arm] for arm in arms}
    flights = tuple(Curve(arm, in_flight(mine, bin_s)) for arm, mine in by_arm.items())
    lags = tuple(Curve(arm, latest_sends(mine, bin_s)) for arm, mine in by_arm.items())
    tracks = [Track("in flight", flights)]
    if any(curve.points for curve in lags):
        tracks.append(Track("send lag, ms", lags, is_stepped=False))
    if gauges:
        tracks.append(Track("server: waiting", _gauge_curves(gauges, ["waiting"])))
        tracks.append(Track("server: running", _gauge_curves(gauges, ["running", "batch"])))
    return tracks


def in_flight(records: Iterable[RequestRecord], bin_s: float) -> tuple[Point, ...]:
    """Return how many requests were under way: the most in each bin, then what its end left."""
    events = sorted(
        event for record in records for event in ((record.sent_s, 1), (record.ended_s, -1))
    )
    level = 0
    highs: dict[int, int] = {}
    lefts: dict[int, int] = {}
    for time_s, change in events:
        place = math.floor(time_s / bin_s)
        highs[place] = max(highs.get(place, level), level + change)
        level += change
        lefts[place] = level
    points = []
    for place, high in highs.items():
        points.append(Point(place * bin_s, high))
        if place + 1 not in highs:
            points.append(Point((place + 1) * bin_s, lefts[place]))
    return tuple(points)


def latest_sends(records: Iterable[RequestRecord], bin_s: float) -> tuple[Point, ...]:
    """Return the longest send lag in each bin, in milliseconds; none in closed loops."""
    lags_ms: dict[int, float] = {}
    for record in records:
        if record.send_lag_s is not None:
            place = math.floor(record.start_s / bin_s)
            lags_ms[place] = max(lags_ms.get(place, 0.0), record.send_lag_s * 1e3)
    return tuple(Point(place * bin_s, lag_ms) for place, lag_ms in sorted(lags_ms.items()))


def draw_timeline(
    tracks: Sequence[Track],
    turns: Sequence[ArmTurn],
    loads: Sequence[tuple[float, str]],
    styles: Mapping[str, ArmStyle],
) -> str:
    """Draw a row per track over the run's seconds, the arms' turns shaded.

    `loads` are the times at which each load began, with their labels.
    """
    heights = [2.2, *(1.5 for _ in tracks[1:])]

    def paint(figure: Any) -> None:
        rows = figure.subplots(len(tracks), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, track in zip(rows, tracks, strict=True):
            _paint_turns(axes, turns, loads, styles)
            _paint_track(axes, track, styles)
        for start_s, label in loads:
            rows[0].annotate(
                label, (start_s, 1), (2, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", color="#444444", fontsize=9,
            )  # fmt: skip
        rows[-1].set_xlabel("time since the start, s")
        figure.align_ylabels()
        add_legend(figure, _legend(tracks, turns, styles))

    return draw_svg("timeline", 1.1 + sum(heights), paint)


def _gauge_curves(gauges: Sequence[Gauge], quantities: Sequence[str]) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            arm,
            tuple(Point(g.time_s, getattr(g, quantity)) for g in gauges if g.arm == arm),
            quantity,
        )
        for arm in dict.fromkeys(gauge.arm for gauge in gauges)
        for quantity in quantities
    )


def _paint_turns(
    axes: Any,
    turns: Sequence[ArmTurn],
    loads: Sequence[tuple[float, str]],
    styles: Mapping[str, ArmStyle],
) -> None:
    least_s = MIN_TURN_SHARE * max((turn.end_s for turn in turns), default=0.0)
    for turn in turns:
        end_s = max(turn.end_s, turn.start_s + least_s)
        color = GREY if turn.is_warmup else styles[turn.arm].color
        axes.axvspan(turn.start_s, end_s, color=color, alpha=0.13, linewidth=0)
    for start_s, _ in loads:
        axes.axvline(start_s, color=GREY, linewidth=0.8)
    axes.grid(visible=False, axis="x")


def _paint_track(axes: Any, track: Track, styles: Mapping[str, ArmStyle]) -> None:
    for curve in track.curves:
        xs, ys = [point.x for point in curve.points], [point.y for point in curve.points]
        style = styles[curve.arm]
        if track.is_stepped:
            line_style = line_style_of(track.curves, curve)
            axes.step(xs, ys, line_style, where="post", color=style.color, linewidth=1.0)
        else:
            axes.plot(xs, ys, style.marker, color=style.color, markersize=2.5)
    axes.set_ylabel(track.y_name)
    if track.is_stepped:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(bottom=0)


def _legend(
    tracks: Sequence[Track], turns: Sequence[ArmTurn], styles: Mapping[str, ArmStyle]
) -> list[Any]:
    drawn = {curve.arm for track in tracks for curve in track.curves}
    handles: list[Any] = [
        Patch(color=style.color, label=shorten(arm))
        for arm, style in styles.items()
        if arm in drawn
    ]
    if any(turn.is_warmup for turn in turns):
        handles.append(Patch(color=GREY, alpha=0.3, label="warm-up"))
    for track in tracks:
        styled = {curve.quantity: line_style_of(track.curves, curve) for curve in track.curves}
        if len(styled) > 1:
            handles += [
                Line2D([], [], color=GREY, linestyle=line_style, label=quantity)
                for quantity, line_style in styled.items()
            ]
    return handles
