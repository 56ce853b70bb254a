"""The report's plots: plain values in, one inline `<svg>` element out.

Lines and points carry their names beside them. What is NaN or infinite is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise, product
from typing import Any

from estimators.estimate import Estimate
from report.pareto import ParetoPoint, draw_pareto
from report.svg import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    draw_svg,
    move_to_free_place,
    scale_axis,
    shorten,
)

LINE_STYLES = tuple(product(("-", "--", ":"), (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)))
NATS = "nats per token"


@dataclass(frozen=True, slots=True)
class Hop:
    """A step on the way from the teacher: `kl` is KL(teacher ‖ where it arrives), nats per token.

    None was not measured. The hop starts at the one named `after`, else at the one before it.
    """

    name: str
    kl: float | None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Increment:
    """A measured hop and the measured total it starts from, both KL to the teacher in nats."""

    name: str
    start_name: str
    start_kl: float
    kl: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant: seconds per decode step of one sequence, and KL(teacher ‖ variant) in nats."""

    name: str
    step_s: float
    kl: float
    is_passed: bool
    is_on_front: bool
    is_default: bool


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of the loss, a mean per completion token at each of its phase's steps."""

    name: str
    values: tuple[float, ...]
    unit: str = NATS


@dataclass(frozen=True, slots=True)
class PhaseCurves:
    """What a training phase logged at `steps`; every series is as long, or empty.

    `repetition` is the share of repeated n-grams in what the student samples.
    """

    name: str
    steps: tuple[int, ...]
    terms: tuple[LossTerm, ...]
    learning_rates: tuple[float, ...] = ()
    repetition: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RemovedLayer:
    """Teacher layer `layer` went; from then on KL(teacher ‖ pruned) was `kl` nats per token."""

    layer: int
    kl: float


def measured_increments(hops: Iterable[Hop]) -> list[Increment]:
    """Return the hops that have a finite KL; one behind an unmeasured hop starts before that."""
    arrived: dict[str, tuple[str, float]] = {}
    start = ("", 0.0)
    increments = []
    for hop in hops:
        if hop.after is not None:
            start = arrived[hop.after]
        if hop.kl is not None and math.isfinite(hop.kl):
            increments.append(Increment(hop.name, *start, hop.kl))
            start = (hop.name, hop.kl)
        arrived[hop.name] = start
    return increments


def draw_waterfall(increments: Sequence[Increment]) -> str:
    """Draw one bar per hop, from the total before it to its own; the totals are the labels."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for row, hop in enumerate(increments):
            change = hop.kl - hop.start_kl
            color = VERMILION if change > 0 else BLUE
            axes.barh(row, change, left=hop.start_kl, height=0.55, color=color, alpha=0.75)
            axes.plot([hop.kl, hop.kl], [row - 0.38, row + 0.38], color="black", linewidth=2)
            label = f"{hop.kl:.4g}" + (f"  ({change:+.3g})" if hop.start_name else "")
            right = max(hop.kl, hop.start_kl)
            axes.annotate(label, (right, row), (7, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(increments)), [shorten(hop.name) for hop in increments])
        axes.set_ylim(len(increments) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=min(0.0, *(hop.kl for hop in increments)))
        axes.set_xlabel(f"KL(teacher ‖ ·), {NATS}; in brackets the change by the hop")

    return draw_svg("waterfall", 0.9 + 0.36 * len(increments), paint)


def draw_tradeoff(candidates: Sequence[Candidate], references: Sequence[tuple[str, float]]) -> str:
    """Draw step time against KL; `references` are names and seconds per step, as vertical lines."""

    def dress(axes: Any) -> Sequence[Any]:
        front = sorted((each.step_s * 1e3, each.kl) for each in candidates if each.is_on_front)
        if front:
            axes.plot(*zip(*front, strict=True), color=BLUE, drawstyle="steps-post")
        scale_axis(axes, "y", [each.kl for each in candidates])
        lines = sorted(references, key=lambda reference: reference[1])
        names = [_reference_line(axes, index, *line) for index, line in enumerate(lines)]
        axes.set_xlim(left=0)
        return names

    axis_names = ("time per decode step of one sequence, ms", f"KL(teacher ‖ variant), {NATS}")
    return draw_pareto(list(map(_point, candidates)), axis_names, dress)


def _point(candidate: Candidate) -> ParetoPoint:
    is_passed, is_default = candidate.is_passed, candidate.is_default
    notes = [*["default"] * is_default, *["failed a gate"] * (not is_passed)]
    return ParetoPoint(
        shorten(candidate.name) + (f" ({', '.join(notes)})" if notes else ""),
        x=Estimate(candidate.step_s * 1e3),
        y=Estimate(candidate.kl),
        color=BLUE if is_passed else VERMILION,
        marker="*" if is_default else "o" if is_passed else "X",
        size_pt=17 if is_default else 9,
        is_filled=is_passed,
    )


def draw_phase(phase: PhaseCurves, svg_name: str) -> str:
    """Draw a phase's loss terms over its steps, one panel per unit, learning rate beneath.

    The phase has at least one series; `svg_name` sets its ids apart from other plots' of the page.
    """
    units = dict.fromkeys(term.unit for term in phase.terms)
    panels = [(unit, [term for term in phase.terms if term.unit == unit]) for unit in units]
    for name, values in (
        ("learning rate", phase.learning_rates),
        ("repeated share", phase.repetition),
    ):
        if values:
            panels.append((name, [LossTerm("", values)]))
    heights = [2.6 if terms[0].name else 1.1 for _, terms in panels]

    def paint(figure: Any) -> None:
        rows = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
        for (unit, terms), axes in zip(panels, rows[:, 0], strict=True):
            _paint_terms(axes, phase.steps, terms)
            axes.set_ylabel(shorten(unit))
        rows[-1, 0].set_xlabel("optimizer step")

    return draw_svg(svg_name, 0.5 + sum(heights), paint)


def draw_layer_ranking(layers: Sequence[RemovedLayer]) -> str:
    """Draw the KL after each removal, in order of removal."""
    return _bars(
        "layers",
        [str(removed.layer) for removed in layers],
        [removed.kl for removed in layers],
        ("layer removed, in this order", f"KL(teacher ‖ pruned), {NATS}"),
    )


def draw_pass_rates(num_prompts: Sequence[int]) -> str:
    """Draw how many prompts fall into each of the equal bins of the pass rate, 0 to 1."""
    edges = [f"{100 * index / len(num_prompts):.3g}" for index in range(len(num_prompts) + 1)]
    names = [f"{low}–{high}" for low, high in pairwise(edges)]
    return _bars("passrates", names, num_prompts, ("teacher's pass rate, %", "prompts"))


def _bars(
    svg_name: str, names: Sequence[str], values: Sequence[float], axis_names: tuple[str, str]
) -> str:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        bars = axes.bar(range(len(values)), values, color=BLUE, width=0.7)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
        axes.set_xticks(range(len(values)), names)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])

    return draw_svg(svg_name, 3.2, paint)


def _reference_line(axes: Any, index: int, name: str, step_s: float) -> Any:
    axes.axvline(step_s * 1e3, color=GREY, linestyle="--", linewidth=1.2)
    return axes.annotate(
        shorten(name),
        (step_s * 1e3, 0.98),
        (-4 if index == 0 else 4, 0),  # two lines close together keep their names apart
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        va="top",
        ha="right" if index == 0 else "left",
        color="#555555",
    )


def _paint_terms(axes: Any, steps: Sequence[int], terms: Sequence[LossTerm]) -> None:
    scale_axis(axes, "y", [value for term in terms for value in term.values])
    ends = []
    for (line_style, color), term in zip(cycle(LINE_STYLES), terms, strict=False):
        axes.plot(steps, term.values, line_style, color=color, linewidth=1.6)
        finite = [pair for pair in zip(steps, term.values, strict=True) if math.isfinite(pair[1])]
        if finite and term.name:
            ends.append((term.name, finite[-1], color))
    axes.figure.draw_without_rendering()  # settles where the ends are
    taken: list[Any] = []
    for name, end, color in ends:
        text = axes.annotate(shorten(name), end, (8, 0), textcoords="offset points", va="center")
        text.set_color(color)
        move_to_free_place(
            text, [(8, sign * dy) for dy in range(0, 90, 6) for sign in (1, -1)], taken
        )
