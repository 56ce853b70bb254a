"""What a run was started with: `run.json` in its output folder, and whether that is still so."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bundle.hashing import hash_file
from bundle.manifest import TeacherReference
from export.config import ExportConfig, ExportError, JsonlSource
from export.disk import writing_to
from export.teacher import TeacherFolder

RECORD_NAME = "run.json"
_SHOWN_DIGITS = 12


class InputChangedError(ExportError):
    """A run cannot be resumed, because it would go on with other inputs than it began with."""

    exit_code = 4


class InputFile(BaseModel):
    """A file that a run reads: where it lay, and its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    sha256: str


class RunRecord(BaseModel):
    """The inputs of a run. All paths are absolute, so that it resumes from any folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    recipe: InputFile
    jsonl_sources: tuple[InputFile, ...]
    teacher: TeacherReference
    teacher_path: Path
    config: ExportConfig

    @property
    def teacher_folder(self) -> TeacherFolder:
        """The teacher as it was, without looking at it again."""
        return TeacherFolder(self.teacher_path, self.teacher)


def record_run(recipe: Path, config: ExportConfig, teacher: TeacherFolder) -> RunRecord:
    """Write `run.json` into the output folder and return what it says."""
    config = _with_absolute_paths(config)
    record = RunRecord(
        recipe=_input_file(recipe.resolve()),
        jsonl_sources=tuple(_input_file(path) for path in _jsonl_paths(config)),
        teacher=teacher.reference,
        teacher_path=teacher.path.resolve(),
        config=config,
    )
    partial = config.output_dir / f"{RECORD_NAME}.tmp"
    with writing_to(partial):
        config.output_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(config.output_dir / RECORD_NAME)
    return record


def read_run(output_dir: Path) -> RunRecord:
    """Return the record of the run in `output_dir`, which may have been moved since.

    ExportError when there is none or it cannot be read.
    """
    path = output_dir / RECORD_NAME
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read ({error.strerror}): no run began there; start one with "
            "`tandem export run RECIPE`"
        ) from None
    except ValidationError as error:
        raise ExportError(
            f"{path} is damaged or of another version ({error.errors()[0]['msg']}): "
            "`tandem export run RECIPE` writes it again and keeps the finished stages"
        ) from None
    config = record.config.model_copy(update={"output_dir": output_dir.resolve()})
    return record.model_copy(update={"config": config})


def check_files(record: RunRecord) -> None:
    """Raise InputChangedError unless recipe and JSONL sources are as they were."""
    files = [("recipe", record.recipe), *(("JSONL source", f) for f in record.jsonl_sources)]
    for what, file in files:
        now = hash_file(file.path) if file.path.is_file() else None
        _check_same(f"the {what} {file.path}", file.sha256, now, record)


def check_teacher(record: RunRecord, teacher: TeacherFolder) -> None:
    """Raise InputChangedError unless the teacher has the weights that it had."""
    what = f"the teacher {record.config.teacher}"
    _check_same(what, record.teacher.weights_sha256, teacher.reference.weights_sha256, record)


def _check_same(what: str, then: str, now: str | None, record: RunRecord) -> None:
    if now == then:
        return
    found = "is gone" if now is None else f"has sha256 {now[:_SHOWN_DIGITS]}"
    raise InputChangedError(
        f"{what} had sha256 {then[:_SHOWN_DIGITS]} when this run began, now it {found}: "
        f"put it back to resume, or start the changed recipe with `tandem export run "
        f"{record.recipe.path}`, which keeps every stage that the change does not concern"
    )


def _input_file(path: Path) -> InputFile:
    try:
        return InputFile(path=path, sha256=hash_file(path))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None


def _jsonl_paths(config: ExportConfig) -> list[Path]:
    return [source.path for source in config.tasks.sources if isinstance(source, JsonlSource)]


def _with_absolute_paths(config: ExportConfig) -> ExportConfig:
    sources = tuple(
        source.model_copy(update={"path": source.path.resolve()})
        if isinstance(source, JsonlSource)
        else source
        for source in config.tasks.sources
    )
    changes = {
        "teacher": _absolute_spec(config.teacher),
        "student": _absolute_spec(config.student) if config.student else None,
        "output_dir": config.output_dir.resolve(),
        "cache_dir": config.cache_dir.resolve(),
        "tasks": config.tasks.model_copy(update={"sources": sources}),
    }
    return config.model_copy(update=changes)


def _absolute_spec(spec: str) -> str:
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec
