from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bundle.manifest import Gate, StageRecord, TeacherReference, Variant
from bundle.model_folder import open_model_folder
from estimators.estimate import Estimate
from export.measure.summary import STUDENT, TEACHER, TORCH, TRANSFORMERS, EvalSummary, FlipMargins
from export.publish.finished import FinishedRun
from export.publish.plots import Hop, RemovedLayer
from export.publish.report import (
    AcceptCounts,
    Flips,
    ModelRow,
    ModelSize,
    ReportData,
    StageCost,
    render_report,
)
from export.publish.report_data import collect_report
from export.run.settings import ExportConfig
from export.run.stage_names import stage_names
from export.teacher.grading import SecondOpinion
from export.teacher.source import TeacherFolder
from tests.support.export.measured import make_artifacts, make_quality, make_summary, make_tasks

# A finished run as its stages would have left it, with numbers that a test can tell apart.
GRID = {"bits": 4, "block_size": 32}
RECIPE: dict[str, Any] = {
    "teacher": "unused",
    "tasks": {"max_train": 8, "max_test": 2},
    "prune": {"num_removed_layers": 1, "num_texts": 2},
    "distill": {"phases": [{}, {"hidden_weight": 1.0}]},
    "variants": {"int8": GRID | {"bits": 8}, "int4": GRID | {"train": {}}},
}
ACCEPTED = {
    "num_sampled": 10,
    "num_accepted": 7,
    "num_rejected": {"truncated": 2, "empty": 1},
    "pass_rate_histogram": [3, 0, 1],
    "second_opinion": {"version": "0.9.0", "num_asked": 3, "num_right": 2, "num_undecided": 0},
}
TEXTS = [
    {"prompt": "a?", "teacher": "A", "student": "B", "forward_kl": 0.25},
    {"prompt": "b?", "teacher": "C", "student": "", "forward_kl": None},
]


def step(phase: int, number: int, **terms: float) -> dict[str, Any]:
    zeros = dict.fromkeys(("soft", "hard", "hidden", "attention"), 0.0)
    return {"phase": phase, "step": number, "learning_rate": 0.1} | zeros | terms


STEPS = [
    step(0, 0, soft=1.0, hard=3.0),
    step(0, 1, soft=0.5, hard=2.0),
    step(1, 0, soft=0.25, hidden=0.75),
]
PROBES = [
    {"phase": 0, "step": 0, "repeated_share": 0.1},
    {"phase": 0, "step": 2, "repeated_share": 0.3},
]


def summarize(**changes: Any) -> EvalSummary:
    """int8 flips three tokens of the float student's."""
    summary = make_summary(**changes)
    if "quality" in changes:
        return summary
    flipped = make_quality(
        0.125, argmax_agreement=0.85, num_flips=3, flip_margins=FlipMargins(0.1, None, 0.2)
    )
    to_student = {**summary.quality[STUDENT], "int8": flipped}
    return replace(summary, quality={**summary.quality, STUDENT: to_student})


def make_variant(forward_kl: float | None, tokens_per_s: float = 20.0, limit: float = 1.0) -> Any:
    passed = forward_kl is not None and forward_kl <= limit
    unit = "nats per token"
    gate = Gate(
        name="kl_to_teacher", measured=forward_kl, threshold=limit, passed=passed, unit=unit
    )
    metrics = {"decode_tokens_per_s": tokens_per_s}
    if forward_kl is not None:
        metrics["kl_to_teacher"] = forward_kl
    return Variant(
        precision="int8",
        opset=18,
        inputs=("input_ids",),
        outputs=("logits",),
        size_bytes=64,
        num_nodes=1,
        gates=(gate,),
        metrics=metrics,
    )


# int4 could not be measured here.
UNMEASURED = make_variant(None).model_copy(update={"gates": (), "metrics": {}})
VARIANTS = {"fp32": make_variant(0.5), "int8": make_variant(0.625, 40.0), "int4": UNMEASURED}


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            path.write_text(json.dumps(value))


def lay(run: FinishedRun) -> None:
    """Lay what the stages leave into their folders."""
    artifacts = run.artifacts
    trained = artifacts.trained["int4"]
    for folder in (artifacts.accepted, artifacts.untrained, artifacts.evaluation, trained):
        folder.mkdir(parents=True)
    write(artifacts.accepted, accept__json=ACCEPTED)
    if run.config.student is None:
        write(artifacts.untrained, removals__json=[{"layer": 2, "kl": 1.5}])
    shutil.copytree(run.teacher.path.with_name("student"), artifacts.student)
    write(artifacts.student, held_out__json=[1.5, 0.75, 0.5])
    write(artifacts.student, training__jsonl=STEPS, probes__json=PROBES)
    write(trained, training__jsonl=[step(0, 0, soft=0.05)])
    write(artifacts.evaluation, texts__jsonl=TEXTS)


@pytest.fixture(scope="session")
def models(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of four layers and a student of three."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_teacher, folder / "teacher")
    shutil.copytree(tiny_teacher, folder / "student")
    student = AutoModelForCausalLM.from_pretrained(tiny_teacher, num_hidden_layers=3)
    student.save_pretrained(folder / "student")
    return folder


@pytest.fixture
def collect(tmp_path: Path, models: Path) -> Callable[..., ReportData]:
    teacher = models / "teacher"
    reference = TeacherReference(
        source="some/teacher",
        weights_sha256="ab" * 32,
        architecture="LlamaForCausalLM",
        num_parameters=30,
        dtype="F32",
    )

    def collect(
        variants: dict[str, Variant] = VARIANTS,
        default: str | None = "int8",
        student: Path | None = None,
        **changes: Any,
    ) -> ReportData:
        paths = {"output_dir": tmp_path / "run", "student": student and str(student)}
        config = ExportConfig.model_validate(RECIPE | paths)
        artifacts = make_artifacts(tmp_path / "run", trained={"int4": tmp_path / "run" / "int4"})
        records = tuple(
            StageRecord(name=name, key=name, seconds=n, peak_memory_bytes=7, size_bytes=9)
            for n, name in enumerate(stage_names(config)[:-1])
        )
        run = FinishedRun(config, TeacherFolder(teacher, reference), artifacts, records)
        lay(run)
        return collect_report(run, variants, summarize(**changes), default=default)

    return collect


def rows(data: ReportData) -> dict[str, ModelRow]:
    return {row.name: row for row in data.variants}


# --- models


def test_title_and_sizes_name_both_models(collect: Callable[..., ReportData], models: Path) -> None:
    data = collect()
    assert data.title == "some/teacher distilled into 3 layers"
    assert data.teacher == ModelSize("some/teacher", 30, 4)
    assert data.student == ModelSize(
        "student", open_model_folder(models / "student").num_parameters, 3
    )


def test_conditions_say_what_was_measured_on_what(collect: Callable[..., ReportData]) -> None:
    conditions = dict(collect().conditions)
    assert conditions["held-out prompts"] == "2, 20 tokens"
    assert conditions["sampling"] == "temperature 0.8, seed 0"
    assert conditions["teacher weights, sha256"] == "ab" * 32


def test_row_of_a_variant_has_its_numbers(collect: Callable[..., ReportData]) -> None:
    row = rows(collect())["int8"]
    assert (row.is_default, row.is_on_front, row.is_passed) == (True, True, True)
    assert row.kl_to_teacher == Estimate(0.625, 0.0, 1.25)
    assert row.kl_to_student == Estimate(0.125, 0.0, 0.25)
    assert row.flips == Flips(3, 20, 0.1, None, 0.2)
    assert row.argmax_agreement_with_student == 0.85
    assert (row.step_s, row.prefill_s, row.peak_memory_bytes) == (1 / 40, 0.5, 1000)


def test_flips_that_never_happened_have_no_margins(collect: Callable[..., ReportData]) -> None:
    assert rows(collect())["fp32"].flips == Flips(0, 20, None, None, None)


def test_variant_that_was_not_measured_has_a_size_and_no_more(
    collect: Callable[..., ReportData],
) -> None:
    data = collect()
    assert rows(data)["int4"] == ModelRow("int4", size_bytes=64)
    assert "int4" not in {hop.name for hop in data.hops}


def test_kl_that_was_not_finite_is_missing(collect: Callable[..., ReportData]) -> None:
    quality = make_summary().quality
    quality = {**quality, TEACHER: {**quality[TEACHER], "int8": make_quality(None)}}
    variants = VARIANTS | {"int8": make_variant(None)}
    data = collect(variants, "fp32", quality=quality)
    assert rows(data)["int8"].kl_to_teacher is None
    assert Hop("int8", None, after="ONNX fp32") in data.hops
    assert "not finite" in render_report(data)


def test_references_are_the_teacher_in_two_runtimes(collect: Callable[..., ReportData]) -> None:
    found = {row.name: (row.step_s, row.prefill_s) for row in collect().references}
    assert found == {TORCH: (1 / 20, 0.5), TRANSFORMERS: (1 / 20, 0.5)}


def test_without_a_default_no_row_is_one(collect: Callable[..., ReportData]) -> None:
    failed = {name: make_variant(0.6, limit=0.1) for name in ("fp32", "int8")}
    data = collect(failed | {"int4": UNMEASURED}, None)
    assert not any(row.is_default or row.is_on_front or row.is_passed for row in data.variants)
    page = render_report(data)
    assert "No variant is served by default." in page and "✗ FAIL" in page


# --- the way from the teacher


def test_hops_lead_from_the_pruned_student_to_every_variant(
    collect: Callable[..., ReportData],
) -> None:
    assert collect().hops == (
        Hop("pruned student", 1.5),
        Hop("phase 1", 0.75),
        Hop("phase 2", 0.5),
        Hop("ONNX fp32", 0.5),
        Hop("int8", 0.625, after="ONNX fp32"),
    )


def test_pretrained_student_is_where_its_way_begins(
    collect: Callable[..., ReportData], tiny_teacher: Path
) -> None:
    data = collect(student=tiny_teacher)
    assert data.hops[:2] == (Hop("pretrained student", 1.5), Hop("phase 1", 0.75))
    assert data.removed_layers == ()


def test_removed_layers_are_those_of_pruning(collect: Callable[..., ReportData]) -> None:
    assert collect().removed_layers == (RemovedLayer(2, 1.5),)


def test_phases_have_the_terms_that_were_not_zero(collect: Callable[..., ReportData]) -> None:
    first, second, grid = collect().phases
    assert [phase.name for phase in (first, second, grid)] == [
        "phase 1",
        "phase 2",
        "on the grid of int4",
    ]
    assert {t.name: t.values for t in first.terms} == {
        "divergence": (1.0, 0.5),
        "cross-entropy": (3.0, 2.0),
    }
    assert [(t.name, t.unit) for t in second.terms][1] == (
        "hidden states",
        "relative squared error",
    )
    assert [term.values for term in grid.terms] == [(0.05,)]
    assert first.steps == (0, 1)
    assert first.learning_rates == (0.1, 0.1)


def test_probe_holds_until_the_next_one(collect: Callable[..., ReportData]) -> None:
    first, second, grid = collect().phases
    assert first.repetition == (0.1, 0.3)
    assert (second.repetition, grid.repetition) == ((), ())


# --- data, tasks, texts, stages


def test_accept_counts_are_those_of_the_stage(collect: Callable[..., ReportData]) -> None:
    opinion = SecondOpinion("0.9.0", num_asked=3, num_right=2).describe()
    counts = AcceptCounts(7, (("truncated", 2), ("empty", 1)), (3, 0, 1), opinion)
    assert collect().accept_counts == counts


def test_task_scores_are_of_teacher_student_and_default(
    collect: Callable[..., ReportData],
) -> None:
    values = {TEACHER: 0.75, STUDENT: 0.5, "int8": 0.25, "fp32": 0.0}
    tasks = make_tasks(10, {name: dict.fromkeys((10, 2, 1), v) for name, v in values.items()})
    found = collect(tasks=tasks).task_scores
    assert found is not None
    assert (found.num_samples, found.k) == (10, (1, 2, 10))
    expected = [
        (family, model) for family in ("overall", "add") for model in (TEACHER, STUDENT, "int8")
    ]
    assert [(row.family, row.model) for row in found.rows] == expected
    assert found.rows[0].pass_at == (Estimate(0.75, 0.0, 1.0),) * 3
    assert found.rows[0].maj == Estimate(0.75)


@pytest.mark.parametrize("default", ["fp32", None])
def test_task_scores_without_a_quantized_default_are_of_teacher_and_student(
    collect: Callable[..., ReportData], default: str | None
) -> None:
    names = (TEACHER, STUDENT, "fp32", "int8")
    tasks = make_tasks(10, {name: {1: 0.5} for name in names})
    found = collect(default=default, tasks=tasks).task_scores
    assert found is not None
    assert {row.model for row in found.rows} == {TEACHER, STUDENT}


def test_run_without_tasks_has_no_task_scores(collect: Callable[..., ReportData]) -> None:
    assert collect().task_scores is None


def test_prompt_whose_kl_is_null_is_not_a_number(collect: Callable[..., ReportData]) -> None:
    first, second = collect().comparisons
    assert (first.prompt, first.teacher_text, first.student_text) == ("a?", "A", "B")
    assert first.kl == 0.25
    assert math.isnan(second.kl)


def test_every_stage_has_its_cost(collect: Callable[..., ReportData]) -> None:
    stages = collect().stages
    assert [stage.name for stage in stages] == [
        "sample",
        "accept",
        "prune",
        "distill",
        "onnx-fp32",
        "onnx-int8",
        "grid-int4",
        "onnx-int4",
        "evaluate",
    ]
    assert stages[3] == StageCost("distill", 3.0, 7, 9)
