"""Which prompts fit: with their answers into every window that will hold them.

The teacher answers within `sample.max_model_len`; the student is trained on what it says, and the
graphs measure it again within `onnx.max_model_len` and the student's positions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from export.measure.speed import PROMPT_TOKENS
from export.run.errors import ExportError
from export.run.settings import ExportConfig
from export.teacher.task_sources import Loaded
from export.teacher.tasks import Task
from serve.errors import InvalidFieldError

GRAPH_TOKENS = 128
"""Positions that the parity and memory measurements take of a graph (`export.graph.parity`)."""

CountTokens = Callable[[Task], int]


@dataclass(frozen=True, slots=True)
class Window:
    """So many positions hold a prompt and `max_tokens` of an answer; names are a recipe's keys."""

    name: str
    positions: int
    answer_key: str
    max_tokens: int

    def fault(self, num_prompt_tokens: int) -> str | None:
        """Return what is wrong with a prompt of so many tokens, None where it fits."""
        total = num_prompt_tokens + self.max_tokens
        if total <= self.positions:
            return None
        return (
            f"the prompt has {num_prompt_tokens} tokens, with {self.answer_key} {self.max_tokens} "
            f"that is {total}: more than the {self.positions} of {self.name}"
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """Every window of a run; positions are those of the models' configurations."""

    config: ExportConfig
    teacher_positions: int
    student_positions: int

    @property
    def graph(self) -> tuple[str, int]:
        """What limits a graph, and its positions."""
        given, student = self.config.onnx.max_model_len, self.student_positions
        if given <= student:
            return "onnx.max_model_len", given
        return "the student's max_position_embeddings", student

    def of_sampling(self) -> Window:
        sample = self.config.sample
        name, length = "sample.max_model_len", sample.max_model_len
        return Window(name, length, "sample.max_tokens", sample.max_tokens)

    def of_training(self) -> Window:
        name, positions = "the student's max_position_embeddings", self.student_positions
        return Window(name, positions, "sample.max_tokens", self.config.sample.max_tokens)

    def of_held_out(self) -> Window:
        return Window(*self.graph, "sample.max_tokens", self.config.sample.max_tokens)

    def of_answers(self) -> Iterator[Window]:
        """Yield those of tasks that every model answers again."""
        key, max_tokens = "evaluate.task_max_tokens", self.config.evaluate.task_max_tokens
        yield Window(*self.graph, key, max_tokens)
        name = "the teacher's max_position_embeddings"
        yield Window(name, self.teacher_positions, key, max_tokens)

    def of_task(self, task: Task, *, is_answered: bool) -> Iterator[Window]:
        """Yield those that hold a task; `is_answered`: every model answers it in `evaluate`."""
        yield self.of_sampling()
        yield self.of_training() if task.split == "train" else self.of_held_out()
        if is_answered:
            yield from self.of_answers()

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yield key and text of settings that leave no room for any prompt."""
        sample, evaluate = self.config.sample, self.config.evaluate
        if sample.max_model_len > self.teacher_positions:
            yield (
                "sample.max_model_len",
                f"{sample.max_model_len} exceeds the teacher's max_position_embeddings "
                f"{self.teacher_positions}",
            )
        windows = [self.of_sampling(), self.of_training(), self.of_held_out()]
        if evaluate.max_task_prompts:
            windows += self.of_answers()
        for window in windows:
            if window.max_tokens >= window.positions:
                yield (
                    window.answer_key,
                    f"{window.max_tokens} leaves no room for a prompt in the {window.positions} "
                    f"of {window.name}",
                )
        name, positions = self.graph
        num_timed = PROMPT_TOKENS + evaluate.num_timed_tokens + 1
        if positions < GRAPH_TOKENS:
            yield (
                "onnx.max_model_len",
                f"graphs are measured with {GRAPH_TOKENS} positions; " + (f"{name} is {positions}"),
            )
        elif num_timed > min(positions, self.teacher_positions):
            yield (
                "evaluate.num_timed_tokens",
                f"{evaluate.num_timed_tokens} and a prompt of {PROMPT_TOKENS} tokens exceed the "
                f"{min(positions, self.teacher_positions)} positions of graphs and teacher",
            )


def find_long(loaded: Loaded, windows: Windows, count: CountTokens) -> dict[str, str]:
    """Return what is wrong with each prompt that does not fit, or that the template refuses, by id.

    Tasks that `evaluate` would choose instead of those are looked at as well.
    """
    faults = {}
    num_answered = 0
    for task in loaded.tasks:
        is_answered = (
            task.split == "test"
            and task.is_verifiable
            and num_answered < windows.config.evaluate.max_task_prompts
        )
        fault = _fault(task, windows.of_task(task, is_answered=is_answered), count)
        if fault is not None:
            faults[task.task_id] = fault
        else:
            num_answered += is_answered
    return faults


def _fault(task: Task, windows: Iterator[Window], count: CountTokens) -> str | None:
    try:
        num_tokens = count(task)
    except InvalidFieldError as error:
        return f"the teacher cannot be asked this: {error}"
    found = (window.fault(num_tokens) for window in windows if window.max_tokens < window.positions)
    return next(filter(None, found), None)


def without(loaded: Loaded, faults: Mapping[str, str]) -> Loaded:
    """Leave out tasks by id, with a note that counts and names them.

    ExportError when none of a split is left.
    """
    if not faults:
        return loaded
    kept = tuple(task for task in loaded.tasks if task.task_id not in faults)
    for split in ("train", "test"):
        if not any(task.split == split for task in kept):
            raise ExportError(f"tasks.sources: every prompt of the {split} split is too long")
    lines = describe(loaded, faults)
    notes = (f"tasks.sources: {len(faults)} prompts that do not fit are dropped:", *lines)
    return replace(loaded, tasks=kept, notes=(*loaded.notes, *notes))


def describe(loaded: Loaded, faults: Mapping[str, str]) -> Sequence[str]:
    """Return a line for each fault: by file and line, and together those that have no file."""
    lines = [
        f"{loaded.places[task_id]}: {fault}"
        for task_id, fault in faults.items()
        if task_id in loaded.places
    ]
    others = [task for task in loaded.tasks if task.task_id in faults.keys() - loaded.places.keys()]
    if others:
        prompt = reprlib.repr(others[0].prompt)
        more = f" (and {len(others) - 1} others)" if len(others) > 1 else ""
        lines.append(f"tasks.sources: prompt {prompt}{more}: {faults[others[0].task_id]}")
    return lines
