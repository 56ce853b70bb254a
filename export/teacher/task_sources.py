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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from estimators.answers import extract
from estimators.canonical import canonicalise
from export.run.errors import ExportError
from export.run.settings import (
    BuiltinSource,
    JsonlSource,
    ReasoningGymSource,
    TasksConfig,
    TaskSource,
)
from export.teacher.task_rows import SourceTask, TaskRows, TaskRowsError, read_rows
from export.teacher.tasks import (
    GymEntry,
    Split,
    Task,
    builtin_tasks,
    exact_id,
    normalise_prompt,
    prompt_id,
    repeat_key,
    split_of,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tasks of a run. `places` says by id where one stands, if in a file ("rows.jsonl:7");
    `notes` are lines for people: what was left out, and why."""

    tasks: tuple[Task, ...]
    places: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_tasks(config: TasksConfig) -> Loaded:
    """Return the tasks of all sources, `max_train` of train and then `max_test` of test at most.

    When there are more, every source keeps its share: its first ones. A prompt that two sources
    have is the earlier one's. The validation split stays unused.

    Raises:
        ExportError: sources are broken, with a line for each fault; or a split is empty.
    """
    rows = [_load(source, config) for source in config.sources]
    unique, notes = _read(rows, config.on_bad_row)
    selected: list[SourceTask] = []
    for split, limit in (("train", config.max_train), ("test", config.max_test)):
        tasks = _interleave([[t for t in tasks if t.task.split == split] for tasks in unique])
        if not tasks:
            raise ExportError(
                f"tasks.sources have no task of the {split} split; add tasks, or give rows of a "
                f'jsonl source "split": "{split}"'
            )
        selected += tasks[:limit]
    places = {each.task.task_id: each.place for each in selected if each.place}
    return Loaded(tuple(each.task for each in selected), places, notes)


def load_jsonl(path: Path) -> list[Task]:
    """Return the tasks of one file, of all splits. ExportError has a line for each fault."""
    ((tasks,), _) = _read([read_rows(path)], "refuse")
    return [each.task for each in tasks]


def _load(source: TaskSource, config: TasksConfig) -> TaskRows:
    match source:
        case JsonlSource():
            try:
                return read_rows(source.path, source.format)
            except TaskRowsError as error:
                return TaskRows((), error.faults)
        case ReasoningGymSource():
            return TaskRows(tuple(map(SourceTask, _generate_gym(source))))
        case BuiltinSource():
            return TaskRows(tuple(map(SourceTask, _select_builtin(source, config.seed))))


def _read(
    sources: Sequence[TaskRows], on_bad_row: Literal["refuse", "drop"]
) -> tuple[list[list[SourceTask]], tuple[str, ...]]:
    """Return each source's tasks without repeats, and the notes; TaskRowsError for all faults."""
    seen = _Seen()
    unique = [[kept for each in rows.tasks if (kept := seen.add(each))] for rows in sources]
    faults = [fault for rows in sources for fault in rows.faults] + seen.faults
    if faults and on_bad_row == "refuse":
        raise TaskRowsError(faults)
    notes = [note for rows in sources for note in rows.notes]
    if seen.num_repeats:
        notes.append(f"tasks.sources: {seen.num_repeats} repeated prompts are left out")
    if faults:
        notes.append(f"tasks.sources: {len(faults)} faulty rows are dropped:")
        notes += str(TaskRowsError(faults)).splitlines()
    return unique, tuple(notes)


class _Seen:
    """The tasks so far, and how the next one goes with them.

    A prompt repeats another whose text is the same, or reads the same (`repeat_key`) and has the
    same answer. Texts that are merely alike (`normalise_prompt`) share the first one's split unless
    their rows give one, so that no split sees another's.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.num_repeats = 0
        self._by_key: dict[str, list[SourceTask]] = {}
        self._by_id: dict[str, SourceTask] = {}
        self._split_of_alike: dict[str, Split] = {}

    def add(self, each: SourceTask) -> SourceTask | None:
        """Return the task as it is kept, None for a repeat or a fault."""
        same = self._by_key.setdefault(repeat_key(each.task.text), [])
        first = next((other for other in same if _repeats(each.task, other.task)), None)
        if first is not None:
            self._judge_repeat(each, first)
            return None
        kept = self._with_own_id(self._with_split(each))
        if kept is not None:
            same.append(kept)
            self._by_id[kept.task.task_id] = kept
        return kept

    def _judge_repeat(self, each: SourceTask, first: SourceTask) -> None:
        """Count a repeat; rows of one file that contradict each other are a fault."""
        other = self._by_id.get(each.task.task_id)
        if each.has_id and other is not None and other is not first:
            self.faults.append(_id_fault(each, other))
            return
        is_same_file = _file_of(each) == _file_of(first) != ""
        is_other_split = each.has_split and each.task.split != first.task.split
        if is_same_file and (each.task.answer != first.task.answer or is_other_split):
            line = first.place.rpartition(":")[2]
            what = "split" if is_other_split else "answer"
            self.faults.append(
                f"{each.place}: line {line} has the same prompt, with another {what}"
            )
        else:
            self.num_repeats += 1

    def _with_split(self, each: SourceTask) -> SourceTask:
        alike = normalise_prompt(each.task.text)
        split = self._split_of_alike.setdefault(alike, each.task.split)
        if each.has_split or split == each.task.split:
            return each
        return replace(each, task=replace(each.task, split=split))

    def _with_own_id(self, each: SourceTask) -> SourceTask | None:
        other = self._by_id.get(each.task.task_id)
        if other is None:
            return each
        if each.has_id:
            self.faults.append(_id_fault(each, other))
            return None
        return replace(each, task=replace(each.task, task_id=exact_id(each.task.text)))


def _repeats(task: Task, first: Task) -> bool:
    return task.answer == first.answer or task.text.split() == first.text.split()


def _file_of(each: SourceTask) -> str:
    return each.place.rpartition(":")[0]


def _id_fault(each: SourceTask, other: SourceTask) -> str:
    task_id = reprlib.repr(each.task.task_id)
    if _file_of(each) == _file_of(other):
        line = other.place.rpartition(":")[2]
        return f"{each.place}: id {task_id} is that of line {line} too"
    return f"{each.place}: two tasks have the id {task_id}, here and in {other.place or 'a source'}"


def _interleave(sources: Sequence[Sequence[SourceTask]]) -> list[SourceTask]:
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


def scorer_version(config: TasksConfig) -> str | None:
    """Return reasoning-gym's version where its scorers judge answers, None elsewhere."""
    if not any(isinstance(source, ReasoningGymSource) for source in config.sources):
        return None
    _import_gym()
    return importlib.metadata.version("reasoning-gym")


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
