"""What `report.html` shows, gathered from the folders of finished stages."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.manifest import Variant
from bundle.model_folder import open_model_folder
from estimators.estimate import Estimate
from export.measure.held_out import STUDENT, TEACHER
from export.measure.stage import TEXTS_NAME
from export.publish.gates import TORCH, TRANSFORMERS
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
from export.teacher.accept import SUMMARY_NAME as ACCEPT_NAME
from export.teacher.grading import SecondOpinion

if TYPE_CHECKING:
    from export.pipeline import Pipeline

_FLOAT_HOP = f"ONNX {FLOAT_VARIANT}"
_TERMS = {"soft": "divergence", "hard": "cross-entropy", "attention": "attention maps"}


def collect_report(
    pipeline: Pipeline,
    variants: Mapping[str, Variant],
    summary: Mapping[str, Any],
    *,
    default: str | None,
) -> ReportData:
    """Return the report of a pipeline whose stages are all finished."""
    distilled = open_model_folder(pipeline.path(pipeline.distilled), has_tokenizer=False)
    num_layers = distilled.config.num_hidden_layers
    reference = pipeline.teacher.reference
    front = pareto_front(variants)
    return ReportData(
        title=f"{reference.source} distilled into {num_layers} layers",
        variants=tuple(
            _variant_row(name, variant, summary, name == default, name in front)
            for name, variant in variants.items()
        ),
        conditions=_conditions(pipeline, summary),
        teacher=ModelSize(
            reference.source,
            reference.num_parameters,
            pipeline.teacher.model.config.num_hidden_layers,
        ),
        student=ModelSize("student", distilled.num_parameters, num_layers),
        references=tuple(
            ModelRow(
                name,
                step_s=1 / summary["speed"][name]["decode_tokens_per_s"],
                prefill_s=summary["speed"][name]["prefill_s"],
            )
            for name in (TORCH, TRANSFORMERS)
        ),
        hops=tuple(_hops(pipeline, variants, summary)),
        phases=tuple(_all_phases(pipeline)),
        removed_layers=tuple(RemovedLayer(r.layer, r.kl) for r in pipeline.removals),
        accept_counts=_accept_counts(pipeline.path(pipeline.accepted) / ACCEPT_NAME),
        task_scores=_task_scores(summary, variants, default),
        comparisons=tuple(_comparisons(pipeline.path(pipeline.evaluated) / TEXTS_NAME)),
        stages=tuple(_stage_costs(pipeline)),
    )


def _conditions(pipeline: Pipeline, summary: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    sample = pipeline.config.sample
    return (
        ("machine", f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"),
        ("held-out prompts", f"{summary['num_prompts']}, {summary['num_tokens']} tokens"),
        ("sampling", f"temperature {sample.temperature:g}, seed {sample.seed}"),
        ("teacher weights, sha256", pipeline.teacher.reference.weights_sha256),
    )


def _variant_row(
    name: str, variant: Variant, summary: Mapping[str, Any], is_default: bool, is_on_front: bool
) -> ModelRow:
    gates = tuple(
        GateResult(g.name, g.measured, g.threshold, g.passed, g.unit) for g in variant.gates
    )
    if not variant.metrics:
        return ModelRow(name, gates=gates, size_bytes=variant.size_bytes)
    to_teacher = summary["quality"][TEACHER][name]
    to_student = summary["quality"][STUDENT][name]
    speed = summary["speed"][name]
    return ModelRow(
        name=name,
        gates=gates,
        is_default=is_default,
        is_on_front=is_on_front,
        size_bytes=variant.size_bytes,
        kl_to_teacher=_kl(to_teacher),
        kl_to_teacher_p99=to_teacher["forward_kl_p99"],
        kl_to_student=_kl(to_student),
        argmax_agreement_with_teacher=to_teacher["argmax_agreement"],
        argmax_agreement_with_student=to_student["argmax_agreement"],
        flips=_flips(to_student),
        perplexity=summary["perplexity"][name],
        prefill_s=speed["prefill_s"],
        step_s=1 / speed["decode_tokens_per_s"],
        peak_memory_bytes=summary["memory"].get(name),
    )


def _kl(agreement: Mapping[str, Any]) -> Estimate | None:
    if agreement["forward_kl"] is None:
        return None
    return _estimate(agreement["forward_kl"], agreement["forward_kl_ci"])


def _estimate(value: float, interval: Mapping[str, float] | None) -> Estimate:
    if interval is None:
        return Estimate(value)
    return Estimate(value, interval["low"], interval["high"])


def _flips(agreement: Mapping[str, Any]) -> Flips:
    margins = agreement["flip_margins"] or dict.fromkeys(("median", "p90", "max"))
    return Flips(
        agreement["num_flips"],
        agreement["num_tokens"],
        margins["median"],
        margins["p90"],
        margins["max"],
    )


def _hops(
    pipeline: Pipeline, variants: Mapping[str, Variant], summary: Mapping[str, Any]
) -> list[Hop]:
    """Return the way from the teacher: up to the last phase in training's arithmetic (bfloat16),
    from the ONNX graph on in the runtime's own."""
    path = pipeline.path(pipeline.distilled) / HELD_OUT_NAME
    before, *after_phases = read_json(path)
    quality = summary["quality"][TEACHER]
    first = "pruned" if pipeline.config.student is None else "pretrained"
    hops = [Hop(f"{first} student", before)]
    hops += [Hop(f"phase {i}", kl) for i, kl in enumerate(after_phases, start=1)]
    hops.append(Hop(_FLOAT_HOP, quality[FLOAT_VARIANT]["forward_kl"]))
    others = [name for name in variants if name != FLOAT_VARIANT and name in quality]
    return hops + [Hop(n, quality[n]["forward_kl"], after=_FLOAT_HOP) for n in others]


def _all_phases(pipeline: Pipeline) -> list[PhaseCurves]:
    from export.pipeline import PROBES_NAME, TRAINING_NAME

    folder = pipeline.path(pipeline.distilled)
    probes = read_json(folder / PROBES_NAME)
    phases = [
        _phase(f"phase {number + 1}", steps, [p for p in probes if p["phase"] == number])
        for number, steps in _by_phase(folder / TRAINING_NAME).items()
    ]
    for name in pipeline.trained_variants:
        path = pipeline.path(pipeline.trained(name)) / TRAINING_NAME
        phases += [
            _phase(f"on the grid of {name}", steps, []) for steps in _by_phase(path).values()
        ]
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


def _task_scores(
    summary: Mapping[str, Any], variants: Mapping[str, Variant], default: str | None
) -> TaskScores | None:
    if "tasks" not in summary:
        return None
    tasks = summary["tasks"]
    shown = [TEACHER, STUDENT, *([default] if default and default != FLOAT_VARIANT else [])]
    families = ["overall", *tasks["models"][TEACHER]["families"]]
    ks = sorted(map(int, tasks["models"][TEACHER]["overall"]["pass_at_k"]))
    rows = [
        _task_row(family, model, tasks["models"][model], ks)
        for family in families
        for model in shown
    ]
    return TaskScores(tasks["num_samples"], tuple(ks), tuple(rows))


def _task_row(family: str, model: str, scores: Mapping[str, Any], ks: list[int]) -> TaskRow:
    of_family = scores["overall"] if family == "overall" else scores["families"][family]
    return TaskRow(
        family,
        model,
        of_family["num_prompts"],
        tuple(_json_estimate(of_family["pass_at_k"][str(k)]) for k in ks),
        _json_estimate(of_family["majority_at_n"]),
    )


def _json_estimate(raw: Mapping[str, Any]) -> Estimate:
    return _estimate(raw["value"], raw["interval"])


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


def _stage_costs(pipeline: Pipeline) -> list[StageCost]:
    records = [pipeline.stages.finished(spec).record for spec in pipeline.specs]
    return [StageCost(r.name, r.seconds, r.peak_memory_bytes, r.size_bytes) for r in records]
