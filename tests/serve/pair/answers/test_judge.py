"""What answers say about the models: extraction, correctness, votes; when the worker is asked."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from serve.engine.sequence import FinishReason
from serve.pair.answers import equivalence
from serve.pair.answers.equivalence import (
    AnswerWorker,
    NoResult,
    SymbolicUnavailableError,
    WorkerClaim,
)
from serve.pair.answers.formats import compile_formats, starts_in_reasoning
from serve.pair.answers.judge import Case, Judge, Judgement, ReferenceKind
from serve.pair.arm import ArmResult, SampleResult
from serve.pair.request import AnswerMatch, EvaluationSpec
from serve.pair.served import Role
from serve.text.tokenizer import Tokenizer

EQUALS = compile_formats({"equals": r"= *(\S+)", "hanging": "((a+)+$)"})
HANGING = "a" * 40 + "b"
BOXED = EvaluationSpec("boxed", pass_at_k=(1,))
SYMBOLIC = EvaluationSpec("boxed", pass_at_k=(1,), answer_match=AnswerMatch.SYMBOLIC)


class ListedWorker(AnswerWorker):
    """Knows which pairs are the same, and has no result for `unknown`; keeps what it was asked."""

    def __init__(self, *same: set[str], unknown: str | None = None) -> None:
        super().__init__(1)
        self.same = same
        self.unknown = unknown
        self.asked: list[tuple[str, str]] = []

    async def run(self, claim: WorkerClaim, name: str, arguments: tuple[str, ...]) -> Any:
        gold, answer = arguments
        self.asked.append((gold, answer))
        return NoResult.TIMEOUT if self.unknown in arguments else set(arguments) in self.same


def samples_of(role: Role, *texts: str | None) -> list[SampleResult]:
    """None is a sample that was cut off by its deadline."""
    return [
        SampleResult(role, i, FinishReason.DEADLINE if text is None else FinishReason.STOP,
                     text=text or "\\boxed{1}")
        for i, text in enumerate(texts)
    ]  # fmt: skip


def boxed(role: Role, *answers: str) -> ArmResult:
    return ArmResult(role, (1,), samples_of(role, *(f"\\boxed{{{answer}}}" for answer in answers)))


async def run_judge(
    worker: AnswerWorker, evaluation: EvaluationSpec, *arms: ArmResult, case: Case | None = None
) -> Judgement | None:
    judge, case = Judge(worker, EQUALS), case or Case()
    for arm in arms:
        await judge.read_answers(arm.samples, evaluation, case)
    agreement = await judge.judge(evaluation, arms, case)
    await worker.stop()
    return agreement


def judged(
    evaluation: EvaluationSpec,
    *arms: ArmResult,
    worker: AnswerWorker | None = None,
    case: Case | None = None,
) -> Judgement:
    agreement = asyncio.run(run_judge(worker or AnswerWorker(20), evaluation, *arms, case=case))
    assert agreement is not None
    return agreement


@contextmanager
def no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a child process was started")

    with monkeypatch.context() as patched:
        patched.setattr("serve.pair.answers.equivalence.subprocess.Popen", refuse)
        yield


def test_exact_answers_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    gold = EvaluationSpec("boxed", reference_answer="1/2", pass_at_k=(1, 2))
    student = boxed(Role.STUDENT, "\\frac{1}{2}", "0.50", "2")
    with no_process(monkeypatch):
        agreement = judged(gold, student, boxed(Role.TEACHER, "0.5", "0.5"))
    assert [(s.answer, s.correct) for s in student.samples] == [
        ("0.5", True), ("0.5", True), ("2", False),
    ]  # fmt: skip
    assert agreement.same_answer is True
    assert agreement.reference_kind is ReferenceKind.GOLD
    assert agreement.pass_at_k[Role.STUDENT] == {1: pytest.approx(2 / 3), 2: 1.0}


THOUGHT = "<think>\\boxed{5}, so = 5"


@pytest.mark.parametrize("answer_format", ["boxed", "equals"])
def test_answers_are_read_behind_the_reasoning(answer_format: str) -> None:
    said = "\\boxed{4}, so = 4"
    samples = samples_of(
        Role.STUDENT, f"{THOUGHT}</think>{said}", f"= 5</think>{said}", f"{said}{THOUGHT}"
    )
    gold = EvaluationSpec(answer_format, reference_answer="4")
    judged(gold, ArmResult(Role.STUDENT, 1, samples))
    assert [(s.answer, s.correct) for s in samples] == [("4", True), ("4", True), (None, False)]


@pytest.mark.parametrize("answer_format", ["boxed", "equals"])
def test_reasoning_that_the_prompt_opened_and_nothing_ends_has_no_answer(
    answer_format: str,
) -> None:
    async def run() -> list[str | None]:
        worker = AnswerWorker(20)
        samples = samples_of(Role.STUDENT, "\\boxed{4}, so = 4", "</think>\\boxed{4}, so = 4")
        read = Judge(worker, EQUALS).read_answers
        await read(samples, EvaluationSpec(answer_format), Case(), starts_in_reasoning=True)
        await worker.stop()
        return [sample.answer for sample in samples]

    assert asyncio.run(run()) == [None, "4"]


def test_marks_of_reasoning_that_are_special_tokens_are_seen() -> None:
    """`decode` has no text for them; DeepSeek-R1's and Qwen3's are none."""
    raw = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("45?")}, merges=[]))
    raw.add_special_tokens(["<think>", "</think>"])
    tokenizer = Tokenizer(raw)
    ids = tokenizer.encode("<think>5</think>4")
    assert tokenizer.hides_reasoning
    assert (tokenizer.decode(ids), tokenizer.decode_with_reasoning(ids)) == (
        "5 4",
        "<think>5</think>4",
    )
    assert starts_in_reasoning(tokenizer.encode("?<think>"), tokenizer)
    assert not starts_in_reasoning(tokenizer.encode("<think></think>"), tokenizer)


def test_who_leaves_out_a_unit_votes_and_is_judged_with_who_names_it() -> None:
    gold = EvaluationSpec("boxed", reference_answer="5 cm", pass_at_k=(1,))
    student = boxed(Role.STUDENT, "5", "5\\text{ cm}", "x = 5", "5 m", "6")
    agreement = judged(gold, student, boxed(Role.TEACHER, "5"))
    assert [s.correct for s in student.samples] == [True, True, True, False, False]
    assert agreement.pass_at_k[Role.STUDENT] == {1: pytest.approx(3 / 5)}
    voted = judged(BOXED, boxed(Role.STUDENT, "5", "5 cm", "6"), boxed(Role.TEACHER, "x=5"))
    assert voted.votes[Role.STUDENT].share == pytest.approx(2 / 3)
    assert voted.same_answer is True
    assert voted.pass_at_k[Role.STUDENT] == {1: pytest.approx(2 / 3)}


def test_exact_answers_are_read_without_a_turn_of_the_loop() -> None:
    judge = Judge(AnswerWorker(1), EQUALS)
    for step in (
        judge.read_answers([], BOXED, Case()),
        judge.judge(BOXED, [boxed(Role.STUDENT, "1")], Case()),
    ):
        with pytest.raises(StopIteration):
            step.send(None)


def test_samples_that_did_not_end_well_have_no_answer_and_their_arm_no_vote() -> None:
    samples = samples_of(Role.STUDENT, "\\boxed{1}", None)
    gold = EvaluationSpec("boxed", reference_answer="1")
    agreement = judged(gold, ArmResult(Role.STUDENT, (1,), samples))
    assert [(s.answer, s.correct) for s in samples] == [("1", True), (None, None)]
    assert agreement.votes == {}


def test_without_a_reference_answer_nothing_is_correct_or_wrong() -> None:
    student = boxed(Role.STUDENT, "1")
    agreement = judged(BOXED, student)
    assert [s.correct for s in student.samples] == [None]
    assert (agreement.pass_at_k, agreement.reference_kind) == ({}, None)


def test_absent_answer_is_wrong() -> None:
    samples = samples_of(Role.STUDENT, "I do not know.")
    judged(EvaluationSpec("boxed", reference_answer="1"), ArmResult(Role.STUDENT, (1,), samples))
    assert [(s.answer, s.correct) for s in samples] == [(None, False)]


def test_teachers_majority_is_the_reference_where_there_is_no_gold() -> None:
    agreement = judged(BOXED, boxed(Role.STUDENT, "1", "2"), boxed(Role.TEACHER, "1", "1", "3"))
    assert agreement.reference_kind is ReferenceKind.TEACHER_CONSENSUS
    assert agreement.pass_at_k == {
        Role.STUDENT: {1: 0.5}, Role.TEACHER: {1: pytest.approx(2 / 3)},
    }  # fmt: skip


def test_no_format_no_agreement() -> None:
    arm = boxed(Role.STUDENT, "1")
    assert asyncio.run(run_judge(AnswerWorker(1), EvaluationSpec(), arm)) is None
    assert arm.samples[0].answer is None


def test_format_of_the_configuration_extracts_in_the_worker() -> None:
    samples = samples_of(Role.STUDENT, "2 + 2 = 3, no, = 4.0", "nothing", None)
    gold = EvaluationSpec("equals", reference_answer="4")
    judged(gold, ArmResult(Role.STUDENT, (1,), samples))
    assert [(s.answer, s.correct) for s in samples] == [("4", True), (None, False), (None, None)]


def test_answer_whose_extraction_hangs_is_undecided_not_wrong() -> None:
    samples = samples_of(Role.STUDENT, "aa", HANGING, "b")
    gold = EvaluationSpec("hanging", reference_answer="aa", pass_at_k=(1,))
    arm = ArmResult(Role.STUDENT, (1,), samples)
    agreement = judged(gold, arm, worker=AnswerWorker(0.4))
    assert [(s.answer, s.correct) for s in samples] == [("aa", True), (None, None), (None, False)]
    assert agreement == Judgement({}, {}, ReferenceKind.GOLD, {NoResult.TIMEOUT: 1})


def test_undecided_arm_leaves_the_other_its_vote() -> None:
    arms = [
        ArmResult(r, (1,), samples_of(r, t)) for r, t in zip(Role, ("aa", HANGING), strict=True)
    ]
    agreement = judged(EvaluationSpec("hanging", pass_at_k=(1,)), *arms, worker=AnswerWorker(0.4))
    assert {role: vote.answer for role, vote in agreement.votes.items()} == {Role.STUDENT: "aa"}
    assert (agreement.outcome, agreement.pass_at_k) == (None, {})


def test_worker_that_turns_requests_away_leaves_them_undecided() -> None:
    samples = samples_of(Role.STUDENT, "x = 4")
    worker = AnswerWorker(1, max_waiting=0)
    agreement = judged(
        EvaluationSpec("equals"), ArmResult(Role.STUDENT, (1,), samples), worker=worker
    )
    assert (agreement.votes, agreement.undecided) == ({}, {NoResult.DROPPED: 1})


def test_comparison_without_a_result_leaves_correct_unset() -> None:
    gold = EvaluationSpec(
        "boxed", reference_answer="x+1", pass_at_k=(1,), answer_match=AnswerMatch.SYMBOLIC
    )
    student = boxed(Role.STUDENT, "x+1", "1+x", "x^x", "on")
    teacher = boxed(Role.TEACHER, "1+x")
    agreement = judged(gold, student, teacher, worker=ListedWorker({"x+1", "1+x"}, unknown="x^x"))
    assert [s.correct for s in student.samples] == [True, True, None, False]
    assert agreement.pass_at_k == {Role.TEACHER: {1: 1.0}}
    assert set(agreement.votes) == {Role.TEACHER}
    assert agreement.undecided == {NoResult.TIMEOUT: 1}


def test_reference_that_hangs_ends_the_request_by_its_deadline() -> None:
    gold = EvaluationSpec(
        "boxed", reference_answer="9^{9^{9^9}}+x", answer_match=AnswerMatch.SYMBOLIC
    )
    case = Case(deadline_s=time.monotonic() + 0.5)
    student = boxed(Role.STUDENT, "9^{9^{9^9}}+x", "x+1", "x+2")
    agreement = judged(gold, student, worker=AnswerWorker(3600), case=case)
    assert [s.correct for s in student.samples] == [True, None, None]
    assert agreement.undecided == {NoResult.TIMEOUT: 2}


def test_reading_and_judging_share_one_claim() -> None:
    arms = [ArmResult(role, (1,), samples_of(role, HANGING, HANGING)) for role in Role]
    case = Case()
    agreement = judged(EvaluationSpec("hanging"), *arms, worker=AnswerWorker(0.1), case=case)
    assert agreement.undecided == {NoResult.TIMEOUT: 4}
    assert case.num_failures == 2


def test_equivalent_answers_are_right_and_share_a_vote() -> None:
    gold = EvaluationSpec(
        "boxed", reference_answer="(x+1)^2", pass_at_k=(1,), answer_match=AnswerMatch.SYMBOLIC
    )
    student = boxed(Role.STUDENT, "x^2+2x+1", "x^2+1", "(1+x)^2")
    teacher = boxed(Role.TEACHER, "(x+1)(x+1)")
    agreement = judged(gold, student, teacher)
    assert [s.correct for s in student.samples] == [True, False, True]
    assert [s.answer for s in student.samples] == ["x^2+2x+1", "x^2+1", "(1+x)^2"]
    assert agreement.votes[Role.STUDENT].share == pytest.approx(2 / 3)
    assert agreement.votes[Role.TEACHER].answer == "x^2+2x+1"
    assert agreement.same_answer is True
    assert agreement.pass_at_k == {
        Role.STUDENT: {1: pytest.approx(2 / 3)}, Role.TEACHER: {1: 1.0},
    }  # fmt: skip


def test_students_spelling_stands_for_both_whichever_arm_comes_first() -> None:
    worker = ListedWorker({"x+1", "1+x"})
    teacher, student = boxed(Role.TEACHER, "1+x"), boxed(Role.STUDENT, "x+1")
    agreement = judged(SYMBOLIC, teacher, student, worker=worker)
    assert {vote.answer for vote in agreement.votes.values()} == {"x+1"}
    assert agreement.pass_at_k == {Role.STUDENT: {1: 1.0}, Role.TEACHER: {1: 1.0}}


def test_each_distinct_answer_is_compared_with_representatives_only() -> None:
    worker = ListedWorker({"x+1", "1+x"})
    judged(SYMBOLIC, boxed(Role.STUDENT, "x+1", "1+x", "x+1", "x+2", "x+2"), worker=worker)
    assert worker.asked == [("x+1", "1+x"), ("x+1", "x+2")]


def test_words_and_numbers_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    gold = EvaluationSpec("boxed", reference_answer="no", answer_match=AnswerMatch.SYMBOLIC)
    with no_process(monkeypatch):
        agreement = judged(gold, boxed(Role.STUDENT, "on", "0.3333333", "1/3", "listen+1"))
    assert agreement.votes[Role.STUDENT].tied == ("0.3333333", "1/3", "listen+1", "on")


def test_arm_whose_answers_cannot_all_be_compared_has_no_vote() -> None:
    worker = ListedWorker({"x+1", "1+x"}, unknown="x^x")
    student, teacher = boxed(Role.STUDENT, "x+1", "1+x"), boxed(Role.TEACHER, "1+x", "x^x", "x^x")
    agreement = judged(SYMBOLIC, student, teacher, worker=worker)
    assert {role: vote.answer for role, vote in agreement.votes.items()} == {Role.STUDENT: "x+1"}
    assert agreement.undecided == {NoResult.TIMEOUT: 2}
    assert (agreement.pass_at_k, agreement.reference_kind) == ({}, None)


def test_pass_at_k_of_a_reference_answer_needs_no_comparison_of_the_others() -> None:
    gold = EvaluationSpec(
        "boxed", reference_answer="no", pass_at_k=(1,), answer_match=AnswerMatch.SYMBOLIC
    )
    student = boxed(Role.STUDENT, "x+1", "x^x", "no", "no")
    agreement = judged(gold, student, worker=ListedWorker(unknown="x^x"))
    assert agreement.votes == {}
    assert agreement.pass_at_k == {Role.STUDENT: {1: pytest.approx(0.5)}}


def test_symbolic_matching_is_refused_where_math_verify_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = Judge(AnswerWorker(1), {})
    judge.check(SYMBOLIC)
    monkeypatch.setattr(equivalence, "is_available", lambda: False)
    judge.check(BOXED)
    with pytest.raises(SymbolicUnavailableError):
        judge.check(SYMBOLIC)


@pytest.mark.parametrize(
    ("name", "pattern", "problem"),
    [
        ("boxed", "(x)", "'boxed' is built in"),
        ("none", "(x)", "'none' is built in"),
        ("", "(x)", "'': a name"),
        ("My format", "(x)", "'My format': a name"),
        ("open", "(x", "'open' is no regular expression"),
        ("many", "(x){9999999999}", "'many' is no regular expression"),
        ("deep", "(" * 3000 + ")" * 3000, "'deep' is no regular expression"),
        ("flat", "x", "'flat' has no group"),
    ],
)
def test_bad_format_is_refused_by_name(name: str, pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        compile_formats({"good": "(x)", name: pattern})
