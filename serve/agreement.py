"""What a request's answers say: which ones are right, votes, consensus and pass@k.

Answers are the same when their canonical forms are equal, or where the request wants it, when they
are mathematically equivalent (`serve.answer_classes`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from estimators import consensus
from estimators.answers import canonicalise, extract
from estimators.consensus import Vote
from estimators.pass_at_k import pass_at_k
from serve.answer_classes import equivalents_of, representatives
from serve.arms import ArmResult, SampleResult
from serve.equivalence import AnswerWorker, check_available
from serve.routing import Role
from serve.specs import AnswerMatch, EvaluationSpec


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


class Judge:
    """Extracts answers and judges them, in the worker only what must not run here.

    Built-in formats and canonical forms take linear time and stay on the loop; patterns of the
    configuration and symbolic comparisons go to `worker`. Where that has no result, a pattern finds
    no answer and canonical forms decide.
    """

    def __init__(self, worker: AnswerWorker, formats: Mapping[str, re.Pattern[str]]) -> None:
        self._worker = worker
        self._formats = formats

    def check(self, evaluation: EvaluationSpec) -> None:
        """Raise SymbolicUnavailableError when the evaluation needs what is not installed."""
        if evaluation.answer_match is AnswerMatch.SYMBOLIC:
            check_available()

    async def read_answers(
        self, samples: Sequence[SampleResult], evaluation: EvaluationSpec
    ) -> None:
        """Set the samples' `answer` and `correct`.

        Those that did not end well have neither; `correct` needs a reference answer.
        """
        complete = [sample for sample in samples if sample.is_complete]
        texts = [sample.text for sample in complete]
        answers = await self._extract(texts, evaluation.answer_format)
        for sample, answer in zip(complete, answers, strict=True):
            sample.answer = canonicalise(answer)
        gold = canonicalise(evaluation.reference_answer)
        if gold is None:
            return
        right = frozenset({gold})
        if evaluation.answer_match is AnswerMatch.SYMBOLIC:
            right = await equivalents_of(gold, [s.answer for s in complete], self._worker)
        for sample in complete:
            sample.correct = sample.answer in right

    async def judge(
        self, evaluation: EvaluationSpec, arms: Sequence[ArmResult]
    ) -> Agreement | None:
        """Vote and estimate pass@k on answers that were read; None when none are extracted.

        What pass@k counts are samples that are `correct`, or without a reference answer, those that
        agree with the teacher's majority.
        """
        if evaluation.answer_format == "none":
            return None
        complete = {arm.role: arm.samples for arm in arms if arm.is_complete}
        answers = await self._comparable_answers(complete, evaluation)
        votes = {role: consensus.majority_vote(of_role) for role, of_role in answers.items()}
        if evaluation.reference_answer is not None:
            outcomes = {role: [bool(s.correct) for s in of] for role, of in complete.items()}
            return _agreement(votes, outcomes, evaluation, ReferenceKind.GOLD)
        majority = votes[Role.TEACHER].answer if Role.TEACHER in votes else None
        if majority is None:
            return Agreement(votes, {}, None)
        outcomes = {role: [a == majority for a in of] for role, of in answers.items()}
        return _agreement(votes, outcomes, evaluation, ReferenceKind.TEACHER_CONSENSUS)

    async def _extract(self, texts: Sequence[str], answer_format: str) -> list[str | None]:
        pattern = self._formats.get(answer_format)
        if pattern is not None:
            return await self._worker.extract(pattern.pattern, texts) if texts else []
        return [extract(text, answer_format) for text in texts]

    async def _comparable_answers(
        self, samples: Mapping[Role, Sequence[SampleResult]], evaluation: EvaluationSpec
    ) -> dict[Role, list[str | None]]:
        """Return the answers by role, spelled so that the same ones are equal."""
        roles = [role for role in Role if role in samples]  # the student's spelling comes first
        answers = {role: [sample.answer for sample in samples[role]] for role in roles}
        if evaluation.answer_match is AnswerMatch.EXACT:
            return answers
        in_order = [answer for role in roles for answer in answers[role]]
        first = await representatives(in_order, self._worker)
        return {role: [a and first[a] for a in of_role] for role, of_role in answers.items()}


def _agreement(
    votes: dict[Role, Vote],
    outcomes: Mapping[Role, Sequence[bool]],
    evaluation: EvaluationSpec,
    kind: ReferenceKind,
) -> Agreement:
    rates = {
        role: {k: float(pass_at_k(len(of), sum(of), k)) for k in evaluation.pass_at_k}
        for role, of in outcomes.items()
    }
    return Agreement(votes, rates, kind)
