"""Which answers of a request are the same when they are matched symbolically.

Answers are canonical forms (`estimators.canonical.canonicalise`): equal ones are the same and two
numbers are so only then. Others are compared where both read as mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from serve.equivalence import NoResult, Turn

_MAX_CHARS = 500

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:/[0-9]+)?")
_SIGN = re.compile(r"[^a-z\s.,;:!?'\"]")
_WORD = re.compile(r"\\[a-z]+|[a-z]{3,}")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "min", "max"}
)


def may_be_equivalent(a: str, b: str) -> bool:
    """Say whether to compare two distinct canonical forms.

    Not words, which math-verify reads as products of letters, so that "on" would be "no". Not two
    numbers, which it rounds.

    >>> may_be_equivalent("(x+1)^2", "x^2+2x+1"), may_be_equivalent("2/3", "\\\\frac{4}{6}x")
    (True, True)
    >>> may_be_equivalent("0.1234567", "0.1234568"), may_be_equivalent("listen 1", "silent 1")
    (False, False)
    """
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return False
    return _is_mathematics(a) and _is_mathematics(b)


def _is_mathematics(text: str) -> bool:
    """Say whether it has a sign other than letters (or is one, in upper case), and no words."""
    if len(text) > _MAX_CHARS or not _SIGN.search(text):
        return False
    return all(word.startswith("\\") or word in _FUNCTIONS for word in _WORD.findall(text))


@dataclass(frozen=True, slots=True)
class AnswerClasses:
    """Maps each answer to the first one that is the same.

    `undecided` are those of which that is not known: they stand for themselves.
    """

    first: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, NoResult] = field(default_factory=dict)


async def matches(gold: str, answers: Iterable[str], turn: Turn) -> dict[str, bool | NoResult]:
    """Say of each answer whether it is the same as the gold one."""
    return {answer: await _is_same(gold, answer, turn) for answer in dict.fromkeys(answers)}


async def classify(answers: Iterable[str], turn: Turn) -> AnswerClasses:
    """Compare every distinct answer with the first ones of the classes so far."""
    classes = AnswerClasses()
    for answer in dict.fromkeys(answers):
        same = await _first_same(dict.fromkeys(classes.first.values()), answer, turn)
        if isinstance(same, NoResult):
            classes.undecided[answer] = same
        classes.first[answer] = same if isinstance(same, str) else answer
    return classes


async def _first_same(candidates: Iterable[str], answer: str, turn: Turn) -> str | NoResult | None:
    """Return the first candidate that is the same; else whether that is certain."""
    missing: NoResult | None = None
    for candidate in candidates:
        outcome = await _is_same(candidate, answer, turn)
        if outcome is True:
            return candidate
        if isinstance(outcome, NoResult):
            missing = outcome
    return missing


async def _is_same(a: str, b: str, turn: Turn) -> bool | NoResult:
    if a == b or not may_be_equivalent(a, b):
        return a == b
    return await turn.equivalent(a, b)
