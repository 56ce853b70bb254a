"""What several samples agree on, and whether two models do.

Answers come in as canonical strings (`canonical.canonicalise`); `None` and blank strings abstain.
Nothing here depends on the order of the samples.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from estimators.canonical import group, is_same


@dataclass(frozen=True)
class Vote:
    """The outcome of a vote: one `answer`, or several `tied`, or neither when all abstained.

    `share` is the winner's part of the valid votes (of each one of the tied answers, in a tie),
    None when there were none. `tied` is sorted, and empty unless there is a tie.
    """

    answer: str | None
    share: float | None
    num_valid: int
    num_samples: int
    tie: bool
    tied: tuple[str, ...] = ()


def majority_vote(answers: Iterable[str | None]) -> Vote:
    """Return the most frequent answer; a tie for it is reported as a tie, never "first seen".

    The winner needs more votes than any other answer, not more than half of them. Answers that are
    the same count together (`canonical.group`), under the spelling that says most: 5 and 5 cm.

    Args:
        answers: canonical answers, one per sample; None and blank ones abstain and never win.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning" (2023), section 2.

    >>> majority_vote(["4", "5", "4", None])
    Vote(answer='4', share=0.6666666666666666, num_valid=3, num_samples=4, tie=False, tied=())
    >>> majority_vote(["5", "4"]).tied
    ('4', '5')
    """
    samples = list(answers)
    valid = [answer for answer in samples if answer is not None and answer.strip()]
    stands_for = group(valid)
    votes = Counter(stands_for[answer] for answer in valid)
    num_valid = votes.total()
    if not num_valid:
        return Vote(None, None, num_valid=0, num_samples=len(samples), tie=False)
    most = max(votes.values())
    leading = tuple(sorted(answer for answer, count in votes.items() if count == most))
    tie = len(leading) > 1
    return Vote(
        answer=None if tie else leading[0],
        share=most / num_valid,
        num_valid=num_valid,
        num_samples=len(samples),
        tie=tie,
        tied=leading if tie else (),
    )


def agreement(student: Vote, teacher: Vote) -> bool | None:
    """Return whether both votes have the same answer; None when either has no majority.

    >>> agreement(majority_vote(["4"]), majority_vote(["4", "4", "5"]))
    True
    >>> agreement(majority_vote(["4"]), majority_vote(["4", "5"])) is None
    True
    """
    if student.answer is None or teacher.answer is None:
        return None
    return is_same(student.answer, teacher.answer)


def vote_correctness(vote: Vote, is_correct: Callable[[str], bool]) -> float | None:
    """Return 1.0 or 0.0 for a majority, for a tie the fraction of its answers that are right.

    That fraction is what breaking the tie by chance would score in expectation. None when all
    samples abstained.

    >>> vote_correctness(majority_vote(["4", "5"]), lambda answer: answer == "4")
    0.5
    """
    leading = vote.tied if vote.answer is None else (vote.answer,)
    if not leading:
        return None
    return sum(bool(is_correct(answer)) for answer in leading) / len(leading)
