"""`report.html`: what an export made and what it cost, in one file that needs nothing else.

The caller fills `ReportData` with plain numbers; what it leaves out is named as not measured. The
page holds no script and its policy forbids every load, so it reads the same from a mail as from a
server. Its text is in `data/report.html.j2`, its plots in `export.publish.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from estimators.estimate import Estimate
from export.publish.plots import (
    Candidate,
    Hop,
    PhaseCurves,
    RemovedLayer,
    draw_layer_ranking,
    draw_pass_rates,
    draw_phase,
    draw_tradeoff,
    draw_waterfall,
    measured_increments,
)
from report.formats import (
    NOT_MEASURED,
    show_bytes,
    show_estimate,
    show_number,
    show_percent,
    show_time,
)
from report.page import render_page

MAX_PROMPTS = 10


@dataclass(frozen=True, slots=True)
class ModelSize:
    """How large the teacher or the student is."""

    name: str
    num_parameters: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class GateResult:
    """A measured number against its limit; `measured` is None when it was not finite."""

    name: str
    measured: float | None
    threshold: float
    is_passed: bool
    unit: str


@dataclass(frozen=True, slots=True)
class Flips:
    """Positions where the likeliest token differs from the float student's.

    The margins are the float student's, first logit minus second, at those positions; None when
    there are none.
    """

    num_flips: int
    num_tokens: int
    margin_median: float | None
    margin_p90: float | None
    margin_max: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A variant, or a model to compare with; KL is forward, from the reference, nats per token.

    `prefill_s` is of one prompt, `step_s` of one decode step of one sequence.
    """

    name: str
    gates: tuple[GateResult, ...] = ()
    is_default: bool = False
    is_on_front: bool = False
    size_bytes: int | None = None
    kl_to_teacher: Estimate | None = None
    kl_to_teacher_p99: float | None = None
    kl_to_student: Estimate | None = None
    argmax_agreement_with_teacher: float | None = None
    argmax_agreement_with_student: float | None = None
    flips: Flips | None = None
    perplexity: float | None = None
    prefill_s: float | None = None
    step_s: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def is_passed(self) -> bool:
        """Whether every gate passed; a variant that was never judged has not."""
        return bool(self.gates) and all(gate.is_passed for gate in self.gates)


@dataclass(frozen=True, slots=True)
class AcceptCounts:
    """Rejection sampling of the teacher's completions; `rejected` holds (reason, completions).

    `num_prompts_by_pass_rate` counts verifiable prompts in equal bins of the pass rate, 0 to 1;
    `comparison` says how their answers were compared.
    """

    num_accepted: int
    rejected: tuple[tuple[str, int], ...]
    num_prompts_by_pass_rate: tuple[int, ...] = ()
    comparison: str = ""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One model on one family of tasks; `pass_at` goes with the `k` of its `TaskScores`."""

    family: str
    model: str
    num_prompts: int
    pass_at: tuple[Estimate, ...]
    maj: Estimate | None = None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """pass@k for each `k` and maj@n, from n = `num_samples` completions per prompt."""

    num_samples: int
    k: tuple[int, ...]
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True, slots=True)
class PromptComparison:
    """A held-out prompt with both answers; `kl` is KL(teacher ‖ student), the mean per token.

    `token_kls` are the teacher's tokens with the KL at each, in nats.
    """

    prompt: str
    teacher_text: str
    student_text: str
    kl: float
    token_kls: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage took, and the bytes it left on disk."""

    name: str
    duration_s: float | None = None
    peak_memory_bytes: int | None = None
    artefact_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that the report says. `references` are models that the variants are compared with.

    `conditions` are (what, value) pairs shown on top: hardware, date, seeds, command.
    `comparisons` may hold any number of prompts: those of highest KL are shown.
    """

    title: str
    variants: tuple[ModelRow, ...]
    conditions: tuple[tuple[str, str], ...] = ()
    teacher: ModelSize | None = None
    student: ModelSize | None = None
    references: tuple[ModelRow, ...] = ()
    hops: tuple[Hop, ...] = ()
    phases: tuple[PhaseCurves, ...] = ()
    removed_layers: tuple[RemovedLayer, ...] = ()
    accept_counts: AcceptCounts | None = None
    task_scores: TaskScores | None = None
    comparisons: tuple[PromptComparison, ...] = ()
    stages: tuple[StageCost, ...] = ()


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`: UTF-8, the same bytes for the same data."""
    path.write_text(render_report(data), encoding="utf-8", newline="\n")


def render_report(data: ReportData) -> str:
    """Return the page."""
    return render_page(
        "export",
        _plots(data),
        data=data,
        default=next((row for row in data.variants if row.is_default), None),
        increments=measured_increments(data.hops),
        metrics=METRICS,
        undrawn=[row.name for row in data.variants if _candidate(row) is None],
        worst=sorted(data.comparisons, key=_badness, reverse=True)[:MAX_PROMPTS],
    )


def _plots(data: ReportData) -> dict[str, str]:
    """Return the plots that there is data for, by name."""
    plots = {}
    if increments := measured_increments(data.hops):
        plots["waterfall"] = draw_waterfall(increments)
    if points := [point for row in data.variants if (point := _candidate(row))]:
        steps = [(row.name, row.step_s) for row in data.references if row.step_s is not None]
        plots["pareto"] = draw_tradeoff(points, steps)
    if data.removed_layers:
        plots["layers"] = draw_layer_ranking(data.removed_layers)
    if data.accept_counts and data.accept_counts.num_prompts_by_pass_rate:
        plots["pass_rates"] = draw_pass_rates(data.accept_counts.num_prompts_by_pass_rate)
    for number, phase in enumerate(data.phases):
        if phase.steps and phase.terms:
            plots[f"phase{number}"] = draw_phase(phase, f"phase{number}")
    return plots


def _candidate(row: ModelRow) -> Candidate | None:
    if row.step_s is None or row.kl_to_teacher is None:
        return None
    kl = row.kl_to_teacher.value
    if not (math.isfinite(kl) and math.isfinite(row.step_s)):
        return None
    return Candidate(row.name, row.step_s, kl, row.is_passed, row.is_on_front, row.is_default)


def _badness(comparison: PromptComparison) -> float:
    return math.inf if math.isnan(comparison.kl) else comparison.kl


def _show_flips(flips: Flips | None) -> str:
    if flips is None:
        return NOT_MEASURED
    return f"{flips.num_flips} of {flips.num_tokens} ({flips.num_flips / flips.num_tokens:.1%})"


def _show_margins(flips: Flips | None) -> str:
    if flips is None:
        return NOT_MEASURED
    if not flips.num_flips:
        return "no flips"
    margins = (flips.margin_median, flips.margin_p90, flips.margin_max)
    return " / ".join(map(show_number, margins))


def _tokens_per_s(row: ModelRow) -> str:
    return show_number(None if row.step_s is None else 1 / row.step_s)


METRICS: tuple[tuple[str, Callable[[ModelRow], str]], ...] = (
    ("size on disk", lambda row: show_bytes(row.size_bytes)),
    ("KL(teacher ‖ ·), nats per token", lambda row: show_estimate(row.kl_to_teacher)),
    ("its 99th percentile over tokens", lambda row: show_number(row.kl_to_teacher_p99)),
    ("KL(float student ‖ ·), nats per token", lambda row: show_estimate(row.kl_to_student)),
    ("top-1 agreement, teacher", lambda row: show_percent(row.argmax_agreement_with_teacher)),
    (
        "top-1 agreement, float student",
        lambda row: show_percent(row.argmax_agreement_with_student),
    ),
    ("flips against the float student", lambda row: _show_flips(row.flips)),
    ("margin at flips: median / p90 / max", lambda row: _show_margins(row.flips)),
    ("perplexity of held-out text", lambda row: show_number(row.perplexity)),
    ("prefill of one prompt", lambda row: show_time(row.prefill_s)),
    ("decode step of one sequence", lambda row: show_time(row.step_s)),
    (
        "decode speed of one sequence, tokens/s",
        _tokens_per_s,
    ),
    ("peak memory", lambda row: show_bytes(row.peak_memory_bytes)),
)
