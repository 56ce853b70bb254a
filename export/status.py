"""How far the stages of a run are: read from its folder alone, also while it is running."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bundle.errors import BundleError
from bundle.manifest import StageRecord, load_manifest
from export.inputs import RunInputs
from export.pipeline import BUNDLE_NAME, Pipeline
from export.run.settings import ExportConfig
from export.run.stage_names import PACKAGE, PRETRAINED, SAMPLE, stage_names
from export.run.stages import QuietReporter, StageSpec, StageState, format_summary
from export.student.checkpoint import CHECKPOINTS, Checkpoints
from export.teacher.sample import ROWS_NAME, num_samples_of
from export.teacher.source import TeacherFolder, find_teacher


@dataclass(frozen=True, slots=True)
class StageStatus:
    """How far a stage is: `record` of a finished one, `progress`, for people, of one begun."""

    name: str
    state: StageState = StageState.MISSING
    record: StageRecord | None = None
    progress: str = ""


def read_status(config: ExportConfig, teacher: TeacherFolder | None) -> list[StageStatus]:
    """Return the status of every stage, in order; nothing is fetched or written.

    Without the teacher's hash no stage of its is known: all are to run. ExportError when a source
    of tasks is broken.
    """
    names = stage_names(config)
    found: dict[str, StageStatus] = {}
    if teacher is not None:
        student = find_teacher(config.student, config.cache_dir) if config.student else None
        pipeline = Pipeline(RunInputs(config, teacher, student), QuietReporter())
        # Without a pretrained student's hash, the stages from its own on are not known.
        is_known = config.student is None or student is not None
        known = names[:-1] if is_known else names[: names.index(PRETRAINED)]
        specs = [pipeline.spec(name) for name in known]
        found = {spec.name: _status_of(pipeline, spec) for spec in specs}
        found[PACKAGE] = _package_status(config.output_dir / BUNDLE_NAME, specs)
    return [found.get(name, StageStatus(name)) for name in names]


def _status_of(pipeline: Pipeline, spec: StageSpec) -> StageStatus:
    state, stage = pipeline.stages.state(spec), pipeline.stages.find(spec)
    if stage is not None:
        return StageStatus(spec.name, StageState.FINISHED, stage.record)
    progress = _progress(pipeline, spec) if state is StageState.PARTIAL else ""
    return StageStatus(spec.name, state, progress=progress)


def _progress(pipeline: Pipeline, spec: StageSpec) -> str:
    folder = pipeline.stages.partial_path(spec)
    try:
        if spec.name == SAMPLE:
            tasks = pipeline.inputs.loaded.tasks
            total = sum(num_samples_of(task, pipeline.config.sample) for task in tasks)
            return f"{_count_lines(folder / ROWS_NAME)} of {total} completions"
        saved = Checkpoints(folder / CHECKPOINTS).load()
    except FileNotFoundError:  # renamed or removed by the run since we looked
        return ""
    return f"checkpoint: {_format_place(saved.place)}" if saved else ""


def _format_place(place: Mapping[str, int]) -> str:
    return f"phase {place['phase']}, {place['done']} of its steps done"


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _package_status(bundle: Path, specs: Iterable[StageSpec]) -> StageStatus:
    """Say whether a bundle of these stages is there; `gates` and `select` may still change it."""
    try:
        packaged = {record.key for record in load_manifest(bundle).lineage}
    except BundleError:
        return StageStatus(PACKAGE)
    is_there = {spec.key for spec in specs} <= packaged
    return StageStatus(PACKAGE, StageState.FINISHED if is_there else StageState.MISSING)


# --- for people


def render_status(stages: Sequence[StageStatus]) -> Table:
    """Return the table of `tandem export status`."""
    table = Table(box=None)
    for header in ("stage", "state"):
        table.add_column(header, no_wrap=True)
    for header in ("time", "peak memory", "on disk"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("what came of it, or how far it is")
    for stage in stages:
        numbers, summary = ("", "", ""), stage.progress
        if record := stage.record:
            numbers = (
                format_seconds(record.seconds),
                format_bytes(record.peak_memory_bytes),
                format_bytes(record.size_bytes),
            )
            summary = format_summary(record)
        table.add_row(stage.name, stage.state.value, *numbers, summary)
    return table


def format_seconds(seconds: float) -> str:
    """Return a duration to two or three digits.

    >>> [format_seconds(s) for s in (0.31, 59.4, 754, 90_000)]
    ['0.3 s', '59 s', '13 min', '25.0 h']
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(size_bytes: float | None) -> str:
    """Return a size in a unit in which it has few digits.

    >>> [format_bytes(b) for b in (None, 12_000, 253_000_000, 1_340_000_000)]
    ['', '12 kB', '253 MB', '1.3 GB']
    """
    if size_bytes is None:
        return ""
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:.0f} kB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.1f} GB"
