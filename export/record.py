"""What a run was started with: `run.json` in its output folder, and whether that is still so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bundle.atomic import write_atomically
from bundle.hashing import hash_file, hash_weights
from bundle.manifest import TeacherReference
from bundle.model_inputs import differing_inputs, hash_model_inputs
from export.run.errors import ExportError
from export.run.files import writing_to
from export.run.settings import ExportConfig, JsonlSource
from export.teacher.source import TeacherFolder
from serve.text.chat_template import process_date

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


class ModelInputs(BaseModel):
    """A model that a run reads: what the recipe calls it, where it lay, and its hashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    path: Path
    weights_sha256: str
    files: dict[str, str]

    @classmethod
    def of(cls, spec: str, folder: TeacherFolder) -> ModelInputs:
        return cls(
            spec=spec,
            path=folder.path.resolve(),
            weights_sha256=folder.reference.weights_sha256,
            files=dict(folder.files),
        )


class RunRecord(BaseModel):
    """The inputs of a run. All paths are absolute, so that it resumes from any folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    recipe: InputFile
    jsonl_sources: tuple[InputFile, ...]
    reference: TeacherReference
    teacher: ModelInputs
    student: ModelInputs | None
    template_date: date
    """What chat templates tell as today's date, however many days the run takes."""
    config: ExportConfig

    @property
    def teacher_folder(self) -> TeacherFolder:
        """The teacher as it was, without looking at it again."""
        return TeacherFolder(self.teacher.path, self.reference, self.teacher.files)


def record_run(
    recipe: Path,
    config: ExportConfig,
    teacher: TeacherFolder,
    student: TeacherFolder | None = None,
) -> RunRecord:
    """Write `run.json` into the output folder and return what it says."""
    config = _with_absolute_paths(config)
    record = RunRecord(
        recipe=_input_file(recipe.resolve()),
        jsonl_sources=tuple(_input_file(path) for path in _jsonl_paths(config)),
        reference=teacher.reference,
        teacher=ModelInputs.of(config.teacher, teacher),
        student=ModelInputs.of(config.student or "", student) if student else None,
        template_date=find_template_date(config.output_dir),
        config=config,
    )
    path = config.output_dir / RECORD_NAME
    with writing_to(path):
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial:
            partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
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


def find_run(output_dir: Path) -> RunRecord | None:
    """Return the record of the run in `output_dir` if there is one that can be read."""
    try:
        return read_run(output_dir)
    except ExportError:
        return None


def find_template_date(output_dir: Path) -> date:
    """Return the date in prompts of the run in `output_dir`; of one that begins, today's."""
    record = find_run(output_dir)
    return record.template_date if record else process_date()


@dataclass(frozen=True, slots=True)
class InputChange:
    """An input of a run that is not what it was; None: it was not there, or it is gone."""

    what: str
    then: str | None
    now: str | None

    def __str__(self) -> str:
        if self.then is None:
            return f"{self.what} is new since this run began"
        then = f"had sha256 {self.then[:_SHOWN_DIGITS]} when this run began"
        found = "is gone" if self.now is None else f"has sha256 {self.now[:_SHOWN_DIGITS]}"
        return f"{self.what} {then}, now it {found}"


def file_changes(record: RunRecord) -> list[InputChange]:
    """Return which of recipe and JSONL sources are not as they were."""
    files = [("recipe", record.recipe), *(("JSONL source", f) for f in record.jsonl_sources)]
    hashes = [(f"the {what} {file.path}", file.sha256, _hash_of(file.path)) for what, file in files]
    return [InputChange(*each) for each in hashes if each[1] != each[2]]


def model_changes(
    record: RunRecord, teacher: ModelInputs | None, student: ModelInputs | None
) -> list[InputChange]:
    """Return what of the models is not as it was: their weights, and each file by its name."""
    return [
        *_changes_of("teacher", record.teacher, teacher),
        *(_changes_of("student", record.student, student) if record.student else []),
    ]


def changes_on_disk(record: RunRecord) -> list[InputChange]:
    """Return every change, for `status`: weights are read again only if they are newer."""
    began_s = (record.config.output_dir / RECORD_NAME).stat().st_mtime
    models = [_look_again(model, began_s) for model in (record.teacher, record.student)]
    return [*file_changes(record), *model_changes(record, *models)]


def check_unchanged(record: RunRecord, changes: Sequence[InputChange]) -> None:
    """Raise InputChangedError, with a line for each change."""
    if changes:
        lines = "\n".join(map(str, changes))
        raise InputChangedError(
            f"{lines}: put it back to resume, or start the changed recipe with `tandem export run "
            f"{record.recipe.path}`, which keeps every stage that the change does not concern"
        )


def _changes_of(role: str, then: ModelInputs, now: ModelInputs | None) -> list[InputChange]:
    name = f"the {role} {then.spec}"
    if now is None:
        return [InputChange(name, then.weights_sha256, None)]
    changes = [InputChange(name, then.weights_sha256, now.weights_sha256)]
    for file in differing_inputs(then.files, now.files):
        changes.append(InputChange(f"{file} of {name}", then.files.get(file), now.files.get(file)))
    return [change for change in changes if change.then != change.now]


def _look_again(model: ModelInputs | None, began_s: float) -> ModelInputs | None:
    """Return a model's hashes now, None where its folder is gone."""
    if model is None or not model.path.is_dir():
        return None
    weights = model.path.glob("*.safetensors")
    is_newer = any(path.stat().st_ctime > began_s for path in weights)
    sha256 = (hash_weights(model.path) or "") if is_newer else model.weights_sha256
    files = hash_model_inputs(model.path)
    return model.model_copy(update={"weights_sha256": sha256, "files": files})


def _hash_of(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None


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
