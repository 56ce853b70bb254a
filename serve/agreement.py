"""What a request's answers say: votes, consensus and pass@k over complete arms."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from estimators import consensus
from estimators.answers import canonicalise, extract
from estimators.consensus import Vote
from estimators.pass_at_k import pass_at_k
from serve.arms import ArmResult, SampleResult
from serve.routing import Role
from serve.specs import EvaluationSpec


class ReferenceKind(enum.Enum):
    """What answers were judged against; the value is its label in metrics."""

    GOLD = "gold"
    TEACHER_CONSENSUS = "teacher_consensus"


class ConsensusOutcome(enum.Enum):
    """How two votes compare; the value is its label in metrics."""

    AGREE = "agree"
    DISAGREE = "disagree"
    NO_MAJORITY = "no_majority"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Votes and pass@k by model. Models of which a sample failed are left out."""

    votes: dict[Role, Vote]
    pass_at_k: dict[Role, dict[int, float]]
    reference_kind: ReferenceKind | None

    @property
    def same_answer(self) -> bool | None:
        """Whether both majorities are the same; None when there are no two majorities."""
        if len(self.votes) < 2:
            return None
        return consensus.agreement(self.votes[Role.STUDENT], self.votes[Role.TEACHER])

    @property
    def outcome(self) -> ConsensusOutcome | None:
        """None when there are no two votes to compare."""
        if len(self.votes) < 2:
            return None
        if any(vote.num_valid == 0 for vote in self.votes.values()):
            return ConsensusOutcome.INVALID
        if self.same_answer is None:
            return ConsensusOutcome.NO_MAJORITY
        return ConsensusOutcome.AGREE if self.same_answer else ConsensusOutcome.DISAGREE


def answer_of(sample: SampleResult, evaluation: EvaluationSpec) -> str | None:
    """Return the sample's canonical answer; None when there is none or it did not end well."""
    if not sample.is_complete:
        return None
    return canonicalise(extract(sample.text, evaluation.answer_format))


def is_correct(sample: SampleResult, evaluation: EvaluationSpec) -> bool | None:
    """Compare the sample's answer with the gold one; None without one or without an outcome."""
    if evaluation.reference_answer is None or not sample.is_complete:
        return None
    return answer_of(sample, evaluation) == canonicalise(evaluation.reference_answer)


def judge(evaluation: EvaluationSpec, arms: Iterable[ArmResult]) -> Agreement | None:
    """Vote and estimate pass@k; None when no answers are extracted.

    The reference is the gold answer, else the teacher's majority, else there is none.
    """
    if evaluation.answer_format == "none":
        return None
    answers = {
        arm.role: [answer_of(sample, evaluation) for sample in arm.samples]
        for arm in arms
        if arm.is_complete
    }
    votes = {role: consensus.majority_vote(of_role) for role, of_role in answers.items()}
    reference, kind = _reference(evaluation, votes)
    return Agreement(
        votes,
        {
            role: _pass_at_k(of_role, reference, evaluation.pass_at_k)
            for role, of_role in answers.items()
            if reference is not None
        },
        kind,
    )


def _reference(
    evaluation: EvaluationSpec, votes: dict[Role, Vote]
) -> tuple[str | None, ReferenceKind | None]:
    if evaluation.reference_answer is not None:
        return canonicalise(evaluation.reference_answer), ReferenceKind.GOLD
    if Role.TEACHER in votes and votes[Role.TEACHER].answer is not None:
        return votes[Role.TEACHER].answer, ReferenceKind.TEACHER_CONSENSUS
    return None, None


def _pass_at_k(answers: list[str | None], reference: str, ks: tuple[int, ...]) -> dict[int, float]:
    num_correct = sum(answer == reference for answer in answers)
    return {k: float(pass_at_k(len(answers), num_correct, k)) for k in ks}
