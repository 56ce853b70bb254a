"""Whether completions answer their tasks right: by canonical form, then by a second opinion.

Completions are read behind their reasoning. Where the canonical form of an answer differs from the
right one's and both are mathematics, math-verify is asked, if it is installed (extra `math`), in
the bounded child process that serve has too. A comparison that exceeds its limits leaves the answer
wrong and is counted.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field

from estimators.answers import behind_reasoning, extract
from estimators.canonical import canonicalise, comparable_values, is_same
from export.teacher.task_sources import is_entry_solved
from export.teacher.tasks import Task
from serve.pair.answers.equivalence import AnswerWorker, NoResult, WorkerClaim, is_available

TIMEOUT_S = 2.0
# After so many comparisons without a result the rest is not made: a model that writes towers of
# powers costs minutes, not hours.
MAX_UNDECIDED = 50

_Values = tuple[str, str]  # of the right answer and of a completion's


@dataclass(frozen=True, slots=True)
class Grade:
    """`is_correct` is None where it cannot be checked; `answer` is canonical, None for none."""

    is_correct: bool | None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """Of how many completions math-verify was asked, how many of those are right, or undecided.

    `version` is None where it is not installed: then canonical forms alone decide.
    """

    version: str | None = None
    num_asked: int = 0
    num_right: int = 0
    num_undecided: int = 0

    def describe(self) -> str:
        """Say it in sentences.

        >>> SecondOpinion("0.9.0", 8, 2, 1).describe().partition("0.9.0. ")[2]
        'Of 8 completions that it was asked about, 2 are right, 1 are undecided and count as wrong.'
        """
        said = describe_comparison(self.version)
        if self.version is None:
            return said
        return (
            f"{said} Of {self.num_asked} completions that it was asked about, {self.num_right} are "
            f"right, {self.num_undecided} are undecided and count as wrong."
        )


@dataclass(slots=True)
class _Outcomes:
    equal: set[_Values] = field(default_factory=set)
    undecided: set[_Values] = field(default_factory=set)


def math_verify_version() -> str | None:
    """Return the version of math-verify that would be asked, None where there is none."""
    return importlib.metadata.version("math-verify") if is_available() else None


def describe_comparison(version: str | None) -> str:
    """Say in a sentence how answers are compared, with that version of math-verify or without."""
    if version is None:
        return (
            "Answers are compared by canonical form alone, as math-verify (extra math) is not "
            "installed."
        )
    return f"Answers are compared by canonical form, where that differs by math-verify {version}."


def grade(task: Task, text: str, *, starts_in_reasoning: bool = False) -> Grade:
    """Return a completion's grade by its canonical form alone, or by reasoning-gym's scorer.

    ExportError where reasoning-gym has to judge and cannot (`export.teacher.task_sources`).
    """
    said = behind_reasoning(text, starts_inside=starts_in_reasoning)
    if said is None:
        return Grade(False if task.is_verifiable else None)
    if task.gym_entry is not None:
        # "none" with something to check against: the scorer reads the whole text.
        answer = said if task.answer_format == "none" else extract(said, task.answer_format)
        return Grade(is_entry_solved(task, said), canonicalise(answer))
    answer = canonicalise(extract(said, task.answer_format))
    if task.answer is None:
        return Grade(None, answer)
    return Grade(answer is not None and is_same(answer, task.answer), answer)


def ask_second_opinion(
    tasks: Iterable[Task],
    grades: Iterable[Grade],
    timeout_s: float = TIMEOUT_S,
    max_undecided: int = MAX_UNDECIDED,
) -> tuple[list[Grade], SecondOpinion]:
    """Return the grades, of which wrong ones may now be right, and what was asked.

    `tasks` has each grade's task. Nothing is asked of tasks that reasoning-gym judges.
    """
    pairs = list(zip(tasks, grades, strict=True))
    version = math_verify_version()
    if version is None:
        return [one for _, one in pairs], SecondOpinion()
    values = [_open_values(task, one) for task, one in pairs]
    outcomes = asyncio.run(
        _compare({pair for pair in values if pair is not None}, timeout_s, max_undecided)
    )
    graded = [
        Grade(True, one.answer) if pair in outcomes.equal else one
        for (_, one), pair in zip(pairs, values, strict=True)
    ]
    return graded, SecondOpinion(
        version,
        num_asked=sum(pair is not None for pair in values),
        num_right=sum(pair in outcomes.equal for pair in values),
        num_undecided=sum(pair in outcomes.undecided for pair in values),
    )


def _open_values(task: Task, one: Grade) -> _Values | None:
    """Return what to compare where the canonical form is not all that can be said."""
    if one.is_correct is not False or one.answer is None or task.answer is None or task.gym_entry:
        return None
    return comparable_values(task.answer, one.answer)


async def _compare(pairs: Iterable[_Values], timeout_s: float, max_undecided: int) -> _Outcomes:
    outcomes = _Outcomes()
    worker = AnswerWorker(timeout_s)
    try:
        for pair in sorted(pairs):
            if len(outcomes.undecided) >= max_undecided:
                outcomes.undecided.add(pair)
                continue
            async with worker.turn(WorkerClaim()) as turn:
                outcome = await turn.equivalent(*pair)
            if isinstance(outcome, NoResult):
                outcomes.undecided.add(pair)
            elif outcome:
                outcomes.equal.add(pair)
    finally:
        await worker.stop()
    return outcomes
