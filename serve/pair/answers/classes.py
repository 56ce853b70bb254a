"""Which answers of a request are the same when they are matched symbolically.

Answers are canonical forms. `estimators.canonical` says which of them are the same as they stand,
and of which others the values may be equivalent; those are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from estimators.canonical import comparable_values, group, is_same
from serve.pair.answers.equivalence import NoResult, WorkerTurn


@dataclass(frozen=True, slots=True)
class AnswerClasses:
    """Maps each answer to the first one that is the same.

    `undecided` are those of which that is not known: they stand for themselves.
    """

    first: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, NoResult] = field(default_factory=dict)


async def matches(
    gold: str, answers: Iterable[str], turn: WorkerTurn
) -> dict[str, bool | NoResult]:
    """Say of each answer whether it is the same as the gold one."""
    return {
        answer: is_same(gold, answer) or await _is_equivalent(gold, answer, turn)
        for answer in dict.fromkeys(answers)
    }


async def classify(answers: Iterable[str], turn: WorkerTurn) -> AnswerClasses:
    """Compare every distinct answer with the first ones of the classes so far."""
    classes = AnswerClasses()
    stands_for = group(answers)
    for answer in dict.fromkeys(stands_for.values()):
        same = await _first_same(dict.fromkeys(classes.first.values()), answer, turn)
        if isinstance(same, NoResult):
            classes.undecided[answer] = same
        classes.first[answer] = same if isinstance(same, str) else answer
    for answer, spelled in stands_for.items():
        classes.first[answer] = classes.first[spelled]
        if spelled in classes.undecided:
            classes.undecided[answer] = classes.undecided[spelled]
    return classes


async def _first_same(
    candidates: Iterable[str], answer: str, turn: WorkerTurn
) -> str | NoResult | None:
    """Return the first candidate that is equivalent; else whether that is certain."""
    missing: NoResult | None = None
    for candidate in candidates:
        outcome = await _is_equivalent(candidate, answer, turn)
        if outcome is True:
            return candidate
        if isinstance(outcome, NoResult):
            missing = outcome
    return missing


async def _is_equivalent(a: str, b: str, turn: WorkerTurn) -> bool | NoResult:
    values = comparable_values(a, b)
    return False if values is None else await turn.equivalent(*values)
