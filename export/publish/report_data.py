"""What `report.html` shows, gathered from the folders of finished stages."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundle.manifest import Variant
from bundle.model_folder import open_model_folder
from estimators.estimate import Estimate
from export.measure.stage import TEXTS_NAME
from export.measure.summary import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    EvalSummary,
    ModelQuality,
    PassRates,
)
from export.publish.finished import FinishedRun
from export.publish.plots import Hop, LossTerm, PhaseCurves, RemovedLayer
from export.publish.report import (
    AcceptCounts,
    Flips,
    GateResult,
    ModelRow,
    ModelSize,
    PromptComparison,
    ReportData,
    StageCost,
    TaskRow,
    TaskScores,
)
from export.publish.select import pareto_front
from export.run.files import read_json
from export.run.variants import FLOAT_VARIANT
from export.student.phases import HELD_OUT_NAME
from export.student.prune import read_removals
from export.student.trainer import PROBES_NAME, TRAINING_NAME
from export.teacher.accept import SUMMARY_NAME as ACCEPT_NAME
from export.teacher.grading import SecondOpinion

_FLOAT_HOP = f"ONNX {FLOAT_VARIANT}"
_TERMS = {"soft": "divergence", "hard": "cross-entropy", "attention": "attention maps"}


def collect_report(
    run: FinishedRun,
    variants: Mapping[str, Variant],
    summary: EvalSummary,
    *,
    default: str | None,
) -> ReportData:
    """Return the report of a finished run."""
    distilled = open_model_folder(run.artifacts.student, has_tokenizer=False)
    num_layers = distilled.config.num_hidden_layers
    reference = run.teacher.reference
    front = pareto_front(variants)
    return ReportData(
        title=f"{reference.source} distilled into {num_layers} layers",
        variants=tuple(
            _variant_row(name, variant, summary, name == default, name in front)
            for name, variant in variants.items()
        ),
        conditions=_conditions(run, summary),
        teacher=ModelSize(
            reference.source,
            reference.num_parameters,
            run.teacher.model.config.num_hidden_layers,
        ),
        student=ModelSize("student", distilled.num_parameters, num_layers),
        references=tuple(
            ModelRow(
                name,
                step_s=1 / summary.speed[name].decode_tokens_per_s,
                prefill_s=summary.speed[name].prefill_s,
            )
            for name in (TORCH, TRANSFORMERS)
        ),
        hops=tuple(_hops(run, variants, summary)),
        phases=tuple(_all_phases(run)),
        removed_layers=tuple(
            RemovedLayer(r.layer, r.kl) for r in read_removals(run.artifacts.untrained)
        ),
        accept_counts=_accept_counts(run.artifacts.accepted / ACCEPT_NAME),
        task_scores=_task_scores(summary, default),
        comparisons=tuple(_comparisons(run.artifacts.evaluation / TEXTS_NAME)),
        stages=tuple(_stage_costs(run)),
    )


def _conditions(run: FinishedRun, summary: EvalSummary) -> tuple[tuple[str, str], ...]:
    sample = run.config.sample
    return (
        ("machine", f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"),
        ("held-out prompts", f"{summary.num_prompts}, {summary.num_tokens} tokens"),
        ("sampling", f"temperature {sample.temperature:g}, seed {sample.seed}"),
        ("teacher weights, sha256", run.teacher.reference.weights_sha256),
    )


def _variant_row(
    name: str, variant: Variant, summary: EvalSummary, is_default: bool, is_on_front: bool
) -> ModelRow:
    gates = tuple(
        GateResult(g.name, g.measured, g.threshold, g.passed, g.unit) for g in variant.gates
    )
    if not variant.metrics:
        return ModelRow(name, gates=gates, size_bytes=variant.size_bytes)
    to_teacher, to_student = (summary.quality[reference][name] for reference in (TEACHER, STUDENT))
    speed = summary.speed[name]
    return ModelRow(
        name=name,
        gates=gates,
        is_default=is_default,
        is_on_front=is_on_front,
        size_bytes=variant.size_bytes,
        kl_to_teacher=_kl(to_teacher),
        kl_to_teacher_p99=to_teacher.forward_kl_p99,
        kl_to_student=_kl(to_student),
        argmax_agreement_with_teacher=to_teacher.argmax_agreement,
        argmax_agreement_with_student=to_student.argmax_agreement,
        flips=_flips(to_student),
        perplexity=summary.perplexity[name],
        prefill_s=speed.prefill_s,
        step_s=1 / speed.decode_tokens_per_s,
        peak_memory_bytes=summary.memory.get(name),
    )


def _kl(quality: ModelQuality) -> Estimate | None:
    if quality.forward_kl is None:
        return None
    interval = quality.forward_kl_ci
    if interval is None:
        return Estimate(quality.forward_kl)
    return Estimate(quality.forward_kl, interval.low, interval.high)


def _flips(quality: ModelQuality) -> Flips:
    margins = quality.flip_margins
    if margins is None:
        return Flips(quality.num_flips, quality.num_tokens, None, None, None)
    return Flips(quality.num_flips, quality.num_tokens, margins.median, margins.p90, margins.max)


def _hops(run: FinishedRun, variants: Mapping[str, Variant], summary: EvalSummary) -> list[Hop]:
    """Return the way from the teacher: up to the last phase in training's arithmetic (bfloat16),
    from the ONNX graph on in the runtime's own."""
    path = run.artifacts.student / HELD_OUT_NAME
    before, *after_phases = read_json(path)
    quality = summary.quality[TEACHER]
    first = "pruned" if run.config.student is None else "pretrained"
    hops = [Hop(f"{first} student", before)]
    hops += [Hop(f"phase {i}", kl) for i, kl in enumerate(after_phases, start=1)]
    hops.append(Hop(_FLOAT_HOP, quality[FLOAT_VARIANT].forward_kl))
    others = [name for name in variants if name != FLOAT_VARIANT and name in quality]
    return hops + [Hop(n, quality[n].forward_kl, after=_FLOAT_HOP) for n in others]


def _all_phases(run: FinishedRun) -> list[PhaseCurves]:
    folder = run.artifacts.student
    probes = read_json(folder / PROBES_NAME)
    phases = [
        _phase(f"phase {number + 1}", steps, [p for p in probes if p["phase"] == number])
        for number, steps in _by_phase(folder / TRAINING_NAME).items()
    ]
    for name, trained in run.artifacts.trained.items():
        by_phase = _by_phase(trained / TRAINING_NAME)
        phases += [_phase(f"on the grid of {name}", steps, []) for steps in by_phase.values()]
    return phases


def _by_phase(path: Path) -> dict[int, list[dict[str, Any]]]:
    phases: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        phases.setdefault(step["phase"], []).append(step)
    return phases


def _phase(name: str, steps: list[dict[str, Any]], probes: list[dict[str, Any]]) -> PhaseCurves:
    terms = [
        LossTerm(shown, tuple(step[key] for step in steps))
        for key, shown in _TERMS.items()
        if any(step[key] for step in steps)
    ]
    if any(step["hidden"] for step in steps):
        errors = tuple(step["hidden"] for step in steps)
        terms.append(LossTerm("hidden states", errors, unit="relative squared error"))
    return PhaseCurves(
        name,
        tuple(step["step"] for step in steps),
        tuple(terms),
        tuple(step["learning_rate"] for step in steps),
        _held(probes, len(steps)),
    )


def _held(probes: list[dict[str, Any]], num_steps: int) -> tuple[float, ...]:
    """Return the share of repeated 4-grams at every step: each probe's until the next one."""
    if not probes:
        return ()
    shares = {probe["step"]: probe["repeated_share"] for probe in probes}
    held, last = [], probes[0]["repeated_share"]
    for step in range(num_steps):
        last = shares.get(step, last)
        held.append(last)
    return (*held[:-1], shares.get(num_steps, last))


def _accept_counts(path: Path) -> AcceptCounts:
    counts = read_json(path)
    return AcceptCounts(
        counts["num_accepted"],
        tuple(counts["num_rejected"].items()),
        tuple(counts["pass_rate_histogram"]),
        SecondOpinion(**counts["second_opinion"]).describe(),
    )


def _task_scores(summary: EvalSummary, default: str | None) -> TaskScores | None:
    if summary.tasks is None:
        return None
    models = summary.tasks.models
    shown = [TEACHER, STUDENT, *([default] if default and default != FLOAT_VARIANT else [])]
    ks = sorted(models[TEACHER].overall.pass_at_k)
    rows = [_task_row("overall", model, models[model].overall, ks) for model in shown]
    rows += [
        _task_row(family, model, models[model].families[family], ks)
        for family in models[TEACHER].families
        for model in shown
    ]
    return TaskScores(summary.tasks.num_samples, tuple(ks), tuple(rows))


def _task_row(family: str, model: str, rates: PassRates, ks: list[int]) -> TaskRow:
    return TaskRow(
        family,
        model,
        rates.num_prompts,
        tuple(rates.pass_at_k[k] for k in ks),
        rates.majority_at_n,
    )


def _comparisons(path: Path) -> list[PromptComparison]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        PromptComparison(
            row["prompt"],
            row["teacher"],
            row["student"],
            math.nan if row["forward_kl"] is None else row["forward_kl"],
        )
        for row in rows
    ]


def _stage_costs(run: FinishedRun) -> list[StageCost]:
    return [StageCost(r.name, r.seconds, r.peak_memory_bytes, r.size_bytes) for r in run.records]
