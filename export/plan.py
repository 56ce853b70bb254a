"""`tandem export plan`: what a recipe comes to, and that it can work, before anything runs.

Works without the teacher: what only its files tell is then unknown, and nothing is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import yaml
from rich.console import Console
from rich.table import Table

from bundle.model_weights import expected_shapes
from export.checks import Place, check_room, check_run
from export.estimates import (
    SAMPLING_EFFICIENCY,
    TRAINING_EFFICIENCY,
    Estimator,
    Machine,
    PlannedSize,
    StageEstimate,
    approximate_num_tokens,
    count_workload,
    size_from_name,
)
from export.run.model_specs import is_hub_id
from export.run.settings import ExportConfig
from export.run.stage_names import keeps_model
from export.status import StageStatus, format_bytes, format_seconds, read_status
from export.student.prune import kept_mlp_width
from export.teacher.grading import describe_comparison, math_verify_version
from export.teacher.source import TeacherFolder
from export.teacher.tasks import Task


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The stages of a recipe, each with its state and, unless it is finished, its estimate.

    `notes` say what is left out of the data. `models` are the teacher, and the student where it is
    a pretrained one; None is one that is yet to be fetched.
    """

    config: ExportConfig
    teacher: PlannedSize
    student: PlannedSize
    machine: Machine
    stages: tuple[tuple[StageStatus, StageEstimate], ...]
    notes: tuple[str, ...]
    models: tuple[TeacherFolder | None, ...]


def make_plan(config: ExportConfig, machine: Machine, place: Place = str) -> RunPlan:
    """Return the plan of a recipe; UserError as from `export.checks.check_run`."""
    checked = check_run(config, place)
    teacher = checked.teacher
    teacher_size = size_from_name(config.teacher) if teacher is None else measure_teacher(teacher)
    student_size = _size_of_student(config, teacher, checked.student, teacher_size)
    count = checked.count or _approximate
    workload = count_workload(config, checked.loaded.tasks, count)
    estimator = Estimator(config, workload, teacher_size, student_size, machine)
    stages = read_status(config, teacher)
    estimates = tuple((stage, estimator.estimate(stage.name)) for stage in stages)
    models = (teacher, *([checked.student] if config.student else []))
    if None not in models:  # a recipe may be planned here for another machine
        check_room(config.output_dir, _kept_bytes(estimates), place)
    return RunPlan(
        config, teacher_size, student_size, machine, estimates, checked.loaded.notes, models
    )


def _approximate(task: Task) -> int:
    return approximate_num_tokens(task.text)


def _kept_bytes(stages: Iterable[tuple[StageStatus, StageEstimate]]) -> float:
    """Return what the models of the stages to run take; NaN where their size is unknown."""
    return sum(
        estimate.size_bytes
        for stage, estimate in stages
        if stage.record is None and estimate.size_bytes and keeps_model(stage.name)
    )


# --- sizes


def measure_teacher(teacher: TeacherFolder) -> PlannedSize:
    """Return the size of a model that is here."""
    config = teacher.model.config
    return PlannedSize(
        num_parameters=teacher.reference.num_parameters,
        source="counted",
        num_embedding_parameters=config.vocab_size * config.hidden_size,
        is_tied=config.tie_word_embeddings,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
    )


def count_pruned(config: ExportConfig, teacher: TeacherFolder) -> PlannedSize:
    """Return the size that pruning will leave, from shapes alone."""
    model = teacher.model.config
    width = kept_mlp_width(model.intermediate_size, config.prune.kept_mlp_share)
    num_layers = model.num_hidden_layers - config.prune.num_removed_layers
    pruned = replace(model, intermediate_size=width, num_hidden_layers=num_layers)
    num_parameters = sum(map(math.prod, expected_shapes(pruned).values()))
    return replace(measure_teacher(teacher), num_parameters=num_parameters, num_layers=num_layers)


def _size_of_student(
    config: ExportConfig,
    teacher: TeacherFolder | None,
    student: TeacherFolder | None,
    teacher_size: PlannedSize,
) -> PlannedSize:
    if config.student is not None:
        return size_from_name(config.student) if student is None else measure_teacher(student)
    if teacher is not None:
        return count_pruned(config, teacher)
    if math.isnan(teacher_size.num_parameters):
        return PlannedSize()
    return replace(teacher_size, source="at most: the teacher's")


# --- for people


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print the whole recipe as YAML, then the table of stages and what its numbers are."""
    raw = plan.config.model_dump(mode="json")
    console.print(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), markup=False)
    console.print(f"teacher: {_format_size(plan.teacher)}", markup=False, highlight=False)
    if plan.models[0] is None and is_hub_id(plan.config.teacher):
        line = f"  no folder is named {plan.config.teacher}: fetched from Hugging Face by `run`"
        console.print(line, markup=False, highlight=False)
    console.print(f"student: {_format_size(plan.student)}\n", markup=False, highlight=False)
    for note in plan.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(_table(plan))
    console.print(f"\n{_explanation(plan)}", markup=False, highlight=False)


def _table(plan: RunPlan) -> Table:
    table = Table(box=None)
    for header in ("stage", "state"):
        table.add_column(header, no_wrap=True)
    for header in ("completion tokens", "on disk", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    for stage, estimate in plan.stages:
        table.add_row(stage.name, stage.state.value, *_numbers(stage, estimate))
    return table


def _numbers(stage: StageStatus, estimate: StageEstimate) -> tuple[str, str, str]:
    if stage.record is not None:
        record = stage.record
        return "", format_bytes(record.size_bytes), format_seconds(record.seconds)
    tokens = estimate.completion_tokens
    return (
        "–" if tokens is None else f"≤ {tokens:,}",
        _format_estimate(estimate.size_bytes, format_bytes),
        _format_estimate(estimate.seconds, format_seconds),
    )


def _format_estimate(value: float | None, spell: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    return "unknown" if math.isnan(value) else f"~ {spell(value)}"


def _format_size(size: PlannedSize) -> str:
    if math.isnan(size.num_parameters):
        return "size unknown: it is not on this disk, and its name does not say"
    return f"{size.num_parameters / 1e6:,.0f} M parameters ({size.source})"


def _explanation(plan: RunPlan) -> str:
    seconds = [e.seconds for s, e in plan.stages if s.record is None and e.seconds is not None]
    total = _format_estimate(sum(seconds), format_seconds)
    rate = plan.machine.matmul_flops_per_s / 1e12
    return (
        f"{describe_comparison(math_verify_version())}\n\n"
        f"To run: {total} where estimated. These are estimates, not promises. Tokens are upper "
        "bounds: completions as long as max_tokens, all accepted. Times: 2 FLOPs per parameter "
        "and token forward, 4 backward, at "
        f"{SAMPLING_EFFICIENCY:.0%} (sampling) and {TRAINING_EFFICIENCY:.0%} (reading, training) "
        f"of the {rate:.2f} TFLOP/s that a bf16 matmul reaches here now. Finished stages show "
        "what they took."
    )
