"""What a request's answers say: which ones are right, votes, consensus and pass@k.

Answers are the same when their canonical forms are (`estimators.canonical`), or where the request
wants it, when they are mathematically equivalent (`serve.pair.answers.classes`).
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from estimators import consensus
from estimators.answers import behind_reasoning, extract
from estimators.canonical import canonicalise, is_same
from estimators.consensus import Vote
from estimators.pass_at_k import pass_at_k
from serve.pair.answers.classes import classify, matches
from serve.pair.answers.equivalence import (
    AnswerWorker,
    NoResult,
    WorkerClaim,
    WorkerTurn,
    check_available,
)
from serve.pair.arm import ArmResult, SampleResult
from serve.pair.request import AnswerMatch, EvaluationSpec
from serve.pair.served import Role


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
class Judgement:
    """Votes and pass@k by model. Models of which a sample failed or is undecided are left out.

    `undecided` counts the samples of which the worker could not say what they answer, whether that
    is right, or which of the other answers it equals. The last leaves a pass@k against a reference
    answer as it is.
    """

    votes: dict[Role, Vote]
    pass_at_k: dict[Role, dict[int, float]]
    reference_kind: ReferenceKind | None
    undecided: Mapping[NoResult, int] = field(default_factory=dict)

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


@dataclass(slots=True)
class Case(WorkerClaim):
    """One request before the judge: its claim on the worker, and its samples without a result."""

    undecided: dict[tuple[Role, int], NoResult] = field(default_factory=dict)

    def has_undecided(self, role: Role) -> bool:
        return any(undecided_role is role for undecided_role, _ in self.undecided)

    def add_undecided(self, sample: SampleResult, reason: NoResult) -> None:
        self.undecided[sample.role, sample.index] = reason


def _own_text(sample: SampleResult) -> str:
    return sample.text


class Judge:
    """Extracts answers and judges them, in the worker only what must not run here.

    Built-in formats and canonical forms take linear time and stay on the loop; patterns of the
    configuration and symbolic comparisons go to `worker`. What has no result there is undecided,
    which is neither an absent answer nor a wrong one.
    """

    def __init__(self, worker: AnswerWorker, formats: Mapping[str, re.Pattern[str]]) -> None:
        self._worker = worker
        self._formats = formats

    def check(self, evaluation: EvaluationSpec) -> None:
        """Raise SymbolicUnavailableError when the evaluation needs what is not installed."""
        if evaluation.answer_match is AnswerMatch.SYMBOLIC:
            check_available()

    async def read_answers(
        self,
        samples: Sequence[SampleResult],
        evaluation: EvaluationSpec,
        case: Case,
        *,
        starts_in_reasoning: bool = False,
        read_text: Callable[[SampleResult], str] = _own_text,
    ) -> None:
        """Set the samples' `answer` and `correct`, or one or both not, and say so in the case.

        They are read behind the reasoning, which the prompt may have opened; `read_text` returns a
        text with the marks around it, where a sample's own lacks them. Samples that did not
        end well have neither; `correct` needs a reference answer. One case is for all that is read
        and judged of a request.
        """
        complete = [sample for sample in samples if sample.is_complete]
        async with self._worker.turn(case) as turn:
            texts = [
                behind_reasoning(read_text(sample), starts_inside=starts_in_reasoning) or ""
                for sample in complete
            ]
            await self._extract(complete, texts, evaluation.answer_format, case, turn)
            gold = canonicalise(evaluation.reference_answer)
            if gold is not None:
                extracted = [s for s in complete if (s.role, s.index) not in case.undecided]
                await _grade(gold, extracted, evaluation.answer_match, case, turn)

    async def judge(
        self, evaluation: EvaluationSpec, arms: Sequence[ArmResult], case: Case
    ) -> Judgement | None:
        """Vote and estimate pass@k on answers that were read; None when none are extracted.

        What pass@k counts are samples that are `correct`, or without a reference answer, those that
        agree with the teacher's majority.
        """
        if evaluation.answer_format == "none":
            return None
        read = {
            arm.role: arm.samples
            for arm in arms
            if arm.is_complete and not case.has_undecided(arm.role)
        }
        answers = await self._comparable_answers(read, evaluation.answer_match, case)
        votes = {role: consensus.majority_vote(of_role) for role, of_role in answers.items()}
        undecided = Counter(case.undecided.values())
        if evaluation.reference_answer is not None:
            outcomes = {role: [bool(s.correct) for s in of] for role, of in read.items()}
            rates = _pass_at_k(outcomes, evaluation.pass_at_k)
            return Judgement(votes, rates, ReferenceKind.GOLD, undecided)
        majority = votes[Role.TEACHER].answer if Role.TEACHER in votes else None
        if majority is None:
            return Judgement(votes, {}, None, undecided)
        outcomes = {
            role: [a is not None and is_same(a, majority) for a in of]
            for role, of in answers.items()
        }
        rates = _pass_at_k(outcomes, evaluation.pass_at_k)
        return Judgement(votes, rates, ReferenceKind.TEACHER_CONSENSUS, undecided)

    async def _extract(
        self,
        samples: Iterable[SampleResult],
        texts: Iterable[str],
        answer_format: str,
        case: Case,
        turn: WorkerTurn,
    ) -> None:
        pattern = self._formats.get(answer_format)
        for sample, text in zip(samples, texts, strict=True):
            if pattern is None:
                found: str | NoResult | None = extract(text, answer_format)
            else:
                found = await turn.extract(pattern.pattern, text)
            if isinstance(found, NoResult):
                case.add_undecided(sample, found)
            else:
                sample.answer = canonicalise(found)

    async def _comparable_answers(
        self, samples: Mapping[Role, Sequence[SampleResult]], match: AnswerMatch, case: Case
    ) -> dict[Role, list[str | None]]:
        """Return the answers by role, spelled so that the same ones are equal.

        Roles of which that is not known are left out.
        """
        roles = [role for role in Role if role in samples]  # the student's spelling comes first
        answers = {role: [sample.answer for sample in samples[role]] for role in roles}
        if match is AnswerMatch.EXACT:
            return answers
        in_order = [a for role in roles for a in answers[role] if a is not None]
        async with self._worker.turn(case) as turn:
            classes = await classify(in_order, turn)
        for sample in (sample for role in roles for sample in samples[role]):
            if sample.answer in classes.undecided:
                case.add_undecided(sample, classes.undecided[sample.answer])
        return {
            role: [a and classes.first[a] for a in of_role]
            for role, of_role in answers.items()
            if not case.has_undecided(role)
        }


async def _grade(
    gold: str, samples: Sequence[SampleResult], match: AnswerMatch, case: Case, turn: WorkerTurn
) -> None:
    """Set `correct` where that is known. An absent answer is wrong."""
    answers = [sample.answer for sample in samples if sample.answer is not None]
    outcomes: dict[str, bool | NoResult] = {answer: is_same(gold, answer) for answer in answers}
    if match is AnswerMatch.SYMBOLIC:
        outcomes = await matches(gold, answers, turn)
    for sample in samples:
        outcome = False if sample.answer is None else outcomes[sample.answer]
        if isinstance(outcome, NoResult):
            case.add_undecided(sample, outcome)
        else:
            sample.correct = outcome


def _pass_at_k(
    outcomes: Mapping[Role, Sequence[bool]], ks: Iterable[int]
) -> dict[Role, dict[int, float]]:
    return {
        role: {k: float(pass_at_k(len(of), sum(of), k)) for k in ks}
        for role, of in outcomes.items()
    }
