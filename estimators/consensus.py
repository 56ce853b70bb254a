"""What several samples agree on, and how far two models agree beyond chance.

Answers come in as canonical strings (`canonical.canonicalise`); `None` and blank strings abstain.
Nothing here depends on the order of the samples.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
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


@dataclass(frozen=True)
class AgreementSplit:
    """Compared prompts and agreeing ones, split by whether the teacher was right.

    Agreement where the teacher is wrong is a mistake inherited, not a success.
    """

    compared_teacher_right: int
    agreeing_teacher_right: int
    compared_teacher_wrong: int
    agreeing_teacher_wrong: int


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


def cohen_kappa(a: Sequence[Hashable | None], b: Sequence[Hashable | None]) -> float | None:
    """Return Cohen's κ = (p_o − p_e) / (1 − p_e), agreement in excess of chance, in [−1, 1].

    p_o is the share of pairs that agree, p_e the share that would if each side kept its label
    frequencies and drew at random.

    Args:
        a, b: labels of the same items, in the same order; a pair with a None on either side (an
            abstention) is dropped.

    Returns:
        None, as κ is 0/0, when no pair is left or when p_e is 1: both sides gave one and the same
        label throughout. Report the plain agreement, which is then 1, beside it.

    Raises:
        ValueError: if the lengths differ.

    Source: Cohen, "A Coefficient of Agreement for Nominal Scales" (1960), eq. 1.

    >>> cohen_kappa(["x", "x", "y", "y"], ["x", "y", "y", "y"])
    0.5
    >>> cohen_kappa(["x"], ["x", "y"])
    Traceback (most recent call last):
        ...
    ValueError: a has 1 labels and b has 2; the items must be the same
    """
    _check_lengths("a", a, "b", b, "labels")
    pairs = [pair for pair in zip(a, b, strict=True) if None not in pair]
    a_counts, b_counts = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    # Both agreements times the squared number of pairs, so that they are exact integers.
    observed = len(pairs) * sum(x == y for x, y in pairs)
    expected = sum(a_counts[label] * b_counts[label] for label in a_counts)
    if expected == len(pairs) ** 2:
        return None
    return (observed - expected) / (len(pairs) ** 2 - expected)


def split_agreement(
    agreements: Sequence[bool | None], teacher_correct: Sequence[bool | None]
) -> AgreementSplit:
    """Count prompts and agreeing prompts apart, by whether the teacher was right.

    Args:
        agreements: per prompt what `agreement` returned.
        teacher_correct: per prompt whether the teacher's answer was right, None when not known. A
            prompt with a None on either side is dropped.

    Raises:
        ValueError: if the lengths differ.

    >>> split = split_agreement([True, False, True, None], [True, True, False, True])
    >>> split.agreeing_teacher_right, split.compared_teacher_right
    (1, 2)
    >>> split.agreeing_teacher_wrong, split.compared_teacher_wrong
    (1, 1)
    """
    _check_lengths("agreements", agreements, "teacher_correct", teacher_correct, "entries")
    counts = Counter(
        (bool(right), bool(agrees))
        for agrees, right in zip(agreements, teacher_correct, strict=True)
        if agrees is not None and right is not None
    )
    return AgreementSplit(
        compared_teacher_right=counts[True, True] + counts[True, False],
        agreeing_teacher_right=counts[True, True],
        compared_teacher_wrong=counts[False, True] + counts[False, False],
        agreeing_teacher_wrong=counts[False, True],
    )


def _check_lengths(
    a_name: str, a: Sequence[object], b_name: str, b: Sequence[object], noun: str
) -> None:
    if len(a) != len(b):
        raise ValueError(
            f"{a_name} has {len(a)} {noun} and {b_name} has {len(b)}; the items must be the same"
        )
