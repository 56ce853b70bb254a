"""Where a run's tasks come from: the built-in set, the user's JSONL files, reasoning-gym.

Whatever the source, a prompt without a split of its own gets the one that the hash of its
normalised prompt decides, and a normalised prompt appears once in all: no split sees another's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from bundle.errors import one_line
from bundle.hashing import hash_file, hash_json
from estimators.answers import ANSWER_FORMATS, canonicalise, extract
from export.config import (
    BuiltinSource,
    ExportError,
    JsonlSource,
    ReasoningGymSource,
    TasksConfig,
    TaskSource,
)
from export.tasks import (
    GymEntry,
    Split,
    Task,
    builtin_tasks,
    normalise_prompt,
    prompt_id,
    split_of,
)


def load_tasks(config: TasksConfig) -> list[Task]:
    """Return the tasks of all sources, `max_train` of train and then `max_test` of test at most.

    When there are more, every source keeps its share: its first ones. A prompt that two sources
    have is the earlier one's. The validation split stays unused.

    Raises:
        ExportError: a source is broken, two tasks have one id, or a split is empty.
    """
    sources = _without_repeats([_load(source, config.seed) for source in config.sources])
    selected = []
    for split, limit in (("train", config.max_train), ("test", config.max_test)):
        tasks = _interleave([[t for t in tasks if t.split == split] for tasks in sources])
        if not tasks:
            raise ExportError(
                f"tasks.sources have no task of the {split} split; add tasks, or give rows of a "
                f'jsonl source "split": "{split}"'
            )
        selected += tasks[:limit]
    return selected


def hash_sources(config: TasksConfig) -> str:
    """Return the hex SHA-256 of what the sources depend on besides the recipe.

    That is the content of the JSONL files, and reasoning-gym's version where it is asked for.

    Raises:
        ExportError: a file cannot be read, or reasoning-gym is not installed.
    """
    return hash_json([_fingerprint(source) for source in config.sources])


def _fingerprint(source: TaskSource) -> str:
    if isinstance(source, JsonlSource):
        try:
            return hash_file(source.path)
        except OSError as error:
            raise ExportError(f"{source.path} cannot be read: {error.strerror}") from None
    if isinstance(source, ReasoningGymSource):
        _import_gym()
        return importlib.metadata.version("reasoning-gym")
    return source.kind


def _load(source: TaskSource, seed: int) -> list[Task]:
    if isinstance(source, JsonlSource):
        return load_jsonl(source.path)
    if isinstance(source, ReasoningGymSource):
        return list(_generate_gym(source))
    return _select_builtin(source, seed)


def _without_repeats(sources: Sequence[Iterable[Task]]) -> list[list[Task]]:
    """Keep the first of equal prompts; refuse an id that two different prompts have."""
    prompt_of_id: dict[str, str] = {}
    seen: set[str] = set()
    kept: list[list[Task]] = [[] for _ in sources]
    for tasks, unique in zip(sources, kept, strict=True):
        for task in tasks:
            prompt = normalise_prompt(task.prompt)
            if prompt_of_id.setdefault(task.task_id, prompt) != prompt:
                raise ExportError(
                    f"two tasks have the id {task.task_id!r}; an id is unique in all sources"
                )
            if prompt not in seen:
                seen.add(prompt)
                unique.append(task)
    return kept


def _interleave(sources: Sequence[Sequence[Task]]) -> list[Task]:
    """Merge in order of relative position, so that every prefix has each source's share."""
    ranked = [
        ((index + 0.5) / len(tasks), task) for tasks in sources for index, task in enumerate(tasks)
    ]
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def _select_builtin(source: BuiltinSource, seed: int) -> list[Task]:
    tasks = builtin_tasks(seed)
    if source.families is None:
        return tasks
    known = sorted({task.family for task in tasks})
    for family in source.families:
        if family not in known:
            raise ExportError(
                f"tasks.sources: the built-in set has no family {family!r}; valid: "
                f"{', '.join(known)}"
            )
    return [task for task in tasks if task.family in source.families]


# --- JSONL

_Filled = Annotated[str, StringConstraints(pattern=r"\S")]


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: _Filled
    answer: _Filled | None = None
    answer_format: str | None = None
    id: _Filled | None = None
    family: _Filled = "jsonl"
    split: Split | None = None


def load_jsonl(path: Path) -> list[Task]:
    """Read a file of rows, blank lines left out. ExportError names the path and the line."""
    line_of_id: dict[str, int] = {}
    first_of: dict[str, tuple[int, Task]] = {}
    for number, line in _lines(path):
        place = f"{path}:{number}"
        row = _parse_row(line, place)
        task = _jsonl_task(row, place)
        if row.id is not None and line_of_id.setdefault(row.id, number) != number:
            raise ExportError(f"{place}: id {row.id!r} is that of line {line_of_id[row.id]} too")
        line_of_first, first = first_of.setdefault(normalise_prompt(row.prompt), (number, task))
        if (first.answer, first.split) != (task.answer, task.split):
            raise ExportError(
                f"{place}: line {line_of_first} has the same prompt with another answer or split"
            )
    if not first_of:
        raise ExportError(f"{path}:1: the file is empty; give one JSON object per line")
    return [task for _, task in first_of.values()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ExportError(f"{path}:{number}: not UTF-8: {error.reason}") from None
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _parse_row(line: str, place: str) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = one_line(".".join(map(str, first["loc"])) or "the line")
        raise ExportError(
            f"{place}: {key}: {first['msg']}, got {reprlib.repr(first['input'])}; "
            f"keys: {', '.join(_Row.model_fields)}"
        ) from None


def _jsonl_task(row: _Row, place: str) -> Task:
    default = "none" if row.answer is None else "final_line"
    answer_format = default if row.answer_format is None else row.answer_format
    if answer_format not in ANSWER_FORMATS:
        raise ExportError(
            f"{place}: answer_format {answer_format!r} is unknown; valid: "
            f"{', '.join(ANSWER_FORMATS)}"
        )
    _check_answer(row.answer, answer_format, place)
    return Task(
        task_id=row.id or prompt_id(row.prompt),
        prompt=row.prompt,
        answer=canonicalise(row.answer),
        answer_format=answer_format,
        family=row.family,
        split=row.split or split_of(normalise_prompt(row.prompt)),
    )


def _check_answer(answer: str | None, answer_format: str, place: str) -> None:
    """Refuse an answer that no completion could be found to give."""
    if answer is None:
        if answer_format != "none":
            raise ExportError(f"{place}: answer_format {answer_format!r} needs an answer")
        return
    text = f"\\boxed{{{answer}}}" if answer_format == "boxed" else answer
    found = canonicalise(extract(text, answer_format))
    if found is None or found != canonicalise(answer):
        raise ExportError(
            f"{place}: answer {reprlib.repr(answer)} can never be found by answer_format "
            f"{answer_format!r}, which reads it as {reprlib.repr(found)}"
        )


# --- reasoning-gym

# What a scorer raises on text that it cannot parse (prime_factorization: int("so, 7")).
_UNPARSABLE = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)


def is_entry_solved(task: Task, completion_text: str) -> bool:
    """Return whether the dataset's own `score_answer` gives the completion's answer exactly 1.0.

    Less is partial credit ("42" scores 0.5 for "4"). Scored is what `answer_format` extracts; the
    whole text where the right answer has several lines, or there is no single one.

    Raises:
        ExportError: reasoning-gym is missing, or generates another question than it did.
    """
    assert task.gym_entry is not None, task.task_id
    dataset, entry = _regenerate(task.gym_entry)
    if entry["question"] != task.prompt:
        raise ExportError(
            f"reasoning-gym's {task.gym_entry.dataset}[{task.gym_entry.index}] is another question "
            "than the one that was asked: install the version that generated it, or sample again"
        )
    is_whole_text = task.answer is None or "\n" in entry["answer"].strip()
    answer = completion_text if is_whole_text else extract(completion_text, task.answer_format)
    try:
        return answer is not None and bool(dataset.score_answer(answer.strip(), entry) == 1.0)
    except _UNPARSABLE:
        return False


def _generate_gym(source: ReasoningGymSource) -> Iterator[Task]:
    options = json.dumps(source.options, sort_keys=True)
    for index in range(source.size):
        entry = GymEntry(source.dataset, source.size, source.seed, options, index)
        _, raw = _regenerate(entry)
        answer = None if raw["answer"] is None else canonicalise(raw["answer"])
        yield Task(
            task_id=prompt_id(raw["question"]),
            prompt=raw["question"],
            answer=answer,
            answer_format="none" if answer is None else _gym_answer_format(raw["answer"].strip()),
            family=source.dataset,
            split=split_of(normalise_prompt(raw["question"])),
            gym_entry=entry,
        )


def _gym_answer_format(answer: str) -> str:
    return "last_number" if extract(answer, "last_number") == answer else "final_line"


@functools.lru_cache(maxsize=64)  # the completions of a task are judged one after the other
def _regenerate(entry: GymEntry) -> tuple[Any, dict[str, Any]]:
    """Return the dataset and its entry: the same ones for the same version of the package."""
    dataset = _create_dataset(entry.dataset, entry.size, entry.seed, entry.options)
    return dataset, dataset[entry.index]


@functools.lru_cache(maxsize=16)
def _create_dataset(name: str, size: int, seed: int, options: str) -> Any:
    gym = _import_gym()
    try:
        return gym.create_dataset(name, size=size, seed=seed, **json.loads(options))
    except (AssertionError, TypeError, ValueError) as error:
        raise ExportError(f"tasks.sources: reasoning_gym dataset {name!r}: {error}") from None


def _import_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ExportError(
            f"a reasoning_gym source needs the package reasoning-gym ({error}): "
            "pip install 'tandem[reasoning-gym]'"
        ) from None
