"""What is bound to fail later, told before anything expensive runs: by `plan` as by `run`.

Everything that files say is looked at, and all faults are told together. What only a run can show
(no accepted completion, a gate, a full disk) is left to it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bundle.errors import UserError
from bundle.token_ids import read_eos_token_ids
from export.graph.architecture import check_head_dim
from export.lengths import CountTokens, Windows, describe, find_long, without
from export.record import find_template_date
from export.run.errors import ExportError
from export.run.settings import ExportConfig
from export.student.logits_cache import check_top_k
from export.student.pretrained import check_rows, check_same_tokenizer
from export.student.prune import check_removable
from export.teacher.source import TeacherFolder, find_teacher
from export.teacher.task_sources import Loaded, read_tasks
from serve.text.tokenizer import Tokenizer
from serve.text.tokenizer_files import DEFAULT_TEMPLATE, read_templates

Place = Callable[[str], str]
"""Returns where a key stands: `export.run.recipe.Recipe.place`; the key itself without a file."""

_MAX_SHOWN = 50
_PACKAGES = ("onnx", "onnxruntime", "optimum")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a recipe names and is there: the models (None: yet to be fetched) and the tasks."""

    teacher: TeacherFolder | None
    student: TeacherFolder | None
    loaded: Loaded
    count: CountTokens | None


@dataclass(slots=True)
class _Faults:
    """Faults as they are found, each the error that tells it."""

    place: Place
    errors: list[UserError] = field(default_factory=list)

    @contextmanager
    def catching(self, prefix: str = "") -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.errors.append(type(error)(f"{prefix}{error}") if prefix else error)

    def add(self, key: str, text: str) -> None:
        self.errors.append(ExportError(f"{self.place(key)} {text}"))

    def raise_all(self) -> None:
        """Raise the one error as it is, several as one of several lines."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = list(dict.fromkeys(line for e in self.errors for line in str(e).splitlines()))
            if len(lines) > _MAX_SHOWN:
                lines[_MAX_SHOWN:] = [f"and {len(lines) - _MAX_SHOWN} more faults"]
            raise ExportError("\n".join(lines))


def check_run(config: ExportConfig, place: Place = str) -> Checked:
    """Return what a recipe names, all of it found right; nothing is fetched or written.

    Raises:
        UserError: a line for each fault, with the file and where it has lines, the line.
    """
    faults = _Faults(place)
    teacher = student = loaded = None
    with faults.catching():
        teacher = find_teacher(config.teacher, config.cache_dir)
    with faults.catching():
        student = find_teacher(config.student, config.cache_dir) if config.student else None
    with faults.catching():
        loaded = read_tasks(config.tasks)
    _check_folders(config, teacher, faults)
    _check_packages(faults)
    count = None
    if teacher is not None:
        count = _check_teacher(config, teacher, faults)
        _check_sizes(config, teacher, student, faults)
        if student is not None:
            _check_student(student, teacher, faults)
    windows = find_windows(config, teacher, student)
    for key, text in windows.faults():
        faults.add(key, text)
    if count is not None and loaded is not None:
        loaded = _check_lengths(loaded, windows, count, faults)
    faults.raise_all()
    assert loaded is not None, "read_tasks raised"
    return Checked(teacher, student, loaded, count)


def find_windows(
    config: ExportConfig, teacher: TeacherFolder | None, student: TeacherFolder | None
) -> Windows:
    """Return the windows of a run; a model that is not here yet has all positions."""
    source = teacher if config.student is None else student
    return Windows(config, *(_positions_of(model) for model in (teacher, source)))


def _positions_of(model: TeacherFolder | None) -> int:
    return sys.maxsize if model is None else model.model.config.max_position_embeddings


def fitting_tasks(
    config: ExportConfig, teacher: TeacherFolder, tokenizer: Callable[[], Tokenizer]
) -> Loaded:
    """Return the tasks of a run: without those that do not fit, where the recipe says so."""
    loaded = read_tasks(config.tasks)
    if config.tasks.on_bad_row == "refuse":
        return loaded
    student = find_teacher(config.student, config.cache_dir) if config.student else None
    windows = find_windows(config, teacher, student)
    return without(loaded, find_long(loaded, windows, count_with(tokenizer())))


def count_with(tokenizer: Tokenizer) -> CountTokens:
    """Return the function that counts a prompt's tokens, each prompt once."""
    return cache(lambda task: len(tokenizer.encode_chat(task.messages)))


# --- the parts


def _check_teacher(
    config: ExportConfig, teacher: TeacherFolder, faults: _Faults
) -> CountTokens | None:
    """Look at the files besides the weights; returns how tokens are counted, if they can be."""
    with faults.catching():
        read_eos_token_ids(teacher.path)
    tokenizer = None
    with faults.catching():
        tokenizer = Tokenizer.load(teacher.path, find_template_date(config.output_dir))
    if tokenizer is None:
        return None
    with faults.catching(f"{faults.place('cache.top_k')}: "):
        check_top_k(config.cache, tokenizer.num_tokens)
    with faults.catching():
        check_rows(teacher.path, tokenizer)
    if DEFAULT_TEMPLATE not in read_templates(teacher.path):
        names = "chat_template.jinja, tokenizer_config.json"
        faults.errors.append(
            ExportError(
                f"{teacher.path} has no chat template (looked for in {names}): the teacher cannot "
                "be asked; put the template of its instruct model there"
            )
        )
        return None
    return count_with(tokenizer)


def _check_student(student: TeacherFolder, teacher: TeacherFolder, faults: _Faults) -> None:
    with faults.catching():
        check_same_tokenizer(student.path, teacher.path)
    with faults.catching():
        check_rows(student.path, Tokenizer.load(teacher.path))


def _check_sizes(
    config: ExportConfig, teacher: TeacherFolder, student: TeacherFolder | None, faults: _Faults
) -> None:
    """Look at what the graphs compute, and at what is cut out of the teacher."""
    if config.student is None:
        with faults.catching(f"{faults.place('prune.num_removed_layers')}: "):
            check_removable(teacher.model.config.num_hidden_layers, config.prune)
    source = teacher if config.student is None else student
    if source is not None:
        with faults.catching(f"{source.path / 'config.json'}: "):
            check_head_dim(source.model.config.model_type, source.model.config.head_dim)


def _check_lengths(loaded: Loaded, windows: Windows, count: CountTokens, faults: _Faults) -> Loaded:
    long = find_long(loaded, windows, count)
    if windows.config.tasks.on_bad_row == "drop":
        with faults.catching():
            return without(loaded, long)
    for line in describe(loaded, long):
        faults.errors.append(ExportError(line))
    return loaded


def _check_folders(config: ExportConfig, teacher: TeacherFolder | None, faults: _Faults) -> None:
    """Look at where a run writes."""
    if problem := _why_not_writable(config.output_dir):
        faults.add("output_dir", problem)
    is_fetched = teacher is None
    if is_fetched and (problem := _why_not_writable(config.cache_dir)):
        faults.add("cache_dir", problem)


def _why_not_writable(folder: Path) -> str | None:
    """Say why nothing can be written below `folder`, which need not be there yet."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        return f"{str(folder)!r}: {nearest} is no folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{str(folder)!r}: {nearest} cannot be written"
    return None


def check_room(folder: Path, needed_bytes: float, place: Place) -> None:
    """Raise ExportError where the models of a run are larger than what is free; NaN is unknown."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(nearest).free
    if needed_bytes > free_bytes:
        raise ExportError(
            f"{place('output_dir')} {str(folder)!r}: the models of this run take about "
            f"{needed_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
        )


def _check_packages(faults: _Faults) -> None:
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            faults.errors.append(
                ExportError(f"the package {name} is missing, which writes the graphs: see doctor")
            )
