"""Which answers of a request are the same when they are matched symbolically.

Answers are canonical forms (`estimators.answers.canonicalise`): equal ones are the same and two
numbers are so only then. Others are compared where both read as mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from serve.equivalence import AnswerWorker

_MAX_COMPARISONS = 256
# Each comparison without a result costs the worker's limit and a restart.
_MAX_FAILURES = 2
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


async def equivalents_of(
    gold: str, answers: Iterable[str | None], worker: AnswerWorker
) -> frozenset[str]:
    """Return those of the answers that are the same as the gold one."""
    distinct = list(dict.fromkeys(answer for answer in answers if answer is not None))
    to_compare = [
        answer for answer in distinct if answer != gold and may_be_equivalent(gold, answer)
    ]
    outcomes = (
        await worker.equivalent([(gold, answer) for answer in to_compare]) if to_compare else []
    )
    same = {answer for answer, is_same in zip(to_compare, outcomes, strict=True) if is_same}
    return frozenset(same | {gold})


async def representatives(answers: Iterable[str | None], worker: AnswerWorker) -> dict[str, str]:
    """Map each answer to the first one that is the same.

    Every distinct answer is compared with the representatives so far. Beyond `_MAX_COMPARISONS`, or
    when comparisons fail, canonical forms decide.
    """
    found: dict[str, str] = {}
    comparer = _Comparer(worker)
    for answer in answers:
        if answer is not None and answer not in found:
            found[answer] = await comparer.first_equivalent(dict.fromkeys(found.values()), answer)
    return found


class _Comparer:
    """Compares within the bounds of one request."""

    def __init__(self, worker: AnswerWorker) -> None:
        self._worker = worker
        self._num_left = _MAX_COMPARISONS
        self._num_failures = 0

    async def first_equivalent(self, candidates: Iterable[str], answer: str) -> str:
        """Return the first candidate that is the same as the answer, else the answer."""
        for candidate in candidates:
            if await self._is_same(candidate, answer):
                return candidate
        return answer

    async def _is_same(self, candidate: str, answer: str) -> bool:
        is_worth_it = may_be_equivalent(candidate, answer)
        if not is_worth_it or not self._num_left or self._num_failures >= _MAX_FAILURES:
            return False
        self._num_left -= 1
        (outcome,) = await self._worker.equivalent([(candidate, answer)])
        self._num_failures += outcome is None
        return bool(outcome)
