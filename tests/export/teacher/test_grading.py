"""Right and wrong completions: by canonical form, by reasoning-gym, by math-verify's opinion."""

from __future__ import annotations

import pytest

from export.run.settings import ReasoningGymSource, TasksConfig
from export.teacher import grading
from export.teacher.grading import (
    Grade,
    SecondOpinion,
    ask_second_opinion,
    describe_comparison,
    grade,
)
from export.teacher.task_sources import read_tasks
from export.teacher.tasks import Task

TOWER = "9^{9^{9^9}}+x"


def boxed(answer: str) -> Task:
    return Task("id", "?", answer, "boxed", "math", "train")


def asked(answer: str, *others: str) -> tuple[list[bool | None], SecondOpinion]:
    task = boxed(answer)
    grades = [grade(task, rf"\boxed{{{other}}}") for other in others]
    graded, opinion = ask_second_opinion([task] * len(grades), grades)
    assert [one.answer for one in graded] == [one.answer for one in grades]
    return [one.is_correct for one in graded], opinion


@pytest.mark.parametrize(
    ("answer", "answer_format", "text", "expected"),
    [
        ("4", "last_number", "2 + 2 = 4.0", True),
        ("4", "last_number", "42", False),
        ("4", "last_number", "four", False),
        ("0.5", "boxed", r"so \boxed{\frac{1}{2}}", True),
        ("0.5", "boxed", "so 1/2", False),
        ("B", "choice", "The answer is (b).", True),
        ("paris", "final_line", "The capital is\n\nParis.", True),
        (None, "none", "Paris", None),
        (None, "none", "<think>Paris", None),
        ("4", "last_number", "<think>4", False),
        ("4", "last_number", "5</think>4", True),
    ],
)
def test_grade_follows_the_answer_format(
    answer: str | None, answer_format: str, text: str, expected: bool | None
) -> None:
    task = Task("id", "?", answer, answer_format, "family", "train")
    assert grade(task, text).is_correct is expected


def test_reasoning_that_the_prompt_opened_and_nothing_ends_has_no_answer() -> None:
    task = boxed("4")
    assert grade(task, r"\boxed{4}") == Grade(True, "4")
    assert grade(task, r"\boxed{4}", starts_in_reasoning=True) == Grade(False)
    assert grade(task, r"\boxed{5}</think>\boxed{4}", starts_in_reasoning=True) == Grade(True, "4")


def test_reasoning_gym_judges_its_own_tasks() -> None:
    pytest.importorskip("reasoning_gym")
    source = ReasoningGymSource(kind="reasoning_gym", dataset="chain_sum", size=40, seed=5)
    task = read_tasks(TasksConfig(sources=(source,))).tasks[0]
    assert grade(task, f"It is +{task.answer}.00").is_correct is True
    assert grade(task, f"<think>1</think>It is {task.answer}").is_correct is True
    assert grade(task, f"It is {task.answer}1").is_correct is False


def test_equivalent_answers_are_right_whichever_stands_first() -> None:
    for pair in (("x<5", r"(-\infty,5)"), (r"2\sqrt{2}", r"\sqrt{8}"), ("x+y=3", "y=3-x")):
        for one, other in (pair, pair[::-1]):
            correct, opinion = asked(one, other, "7")
            assert correct == [True, False], pair
            assert opinion.num_right == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("y=2x+3", "2x+3"),
        ("1010_2", "1010"),
        ("f(2)", "f'(2)"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("(1,2)", r"\{1,2\}"),
        ("3.1415926", r"\pi"),
        ("x+1\\text{ cm}", "1+x\\text{ m}"),
        ("on", "no"),
    ],
)
def test_what_math_verify_takes_for_equal_and_is_not_stays_wrong(one: str, other: str) -> None:
    assert asked(one, other)[0] == asked(other, one)[0] == [False]


def test_comparison_that_takes_too_long_leaves_the_answer_wrong_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading, "_TIMEOUT_S", 0.5)
    correct, opinion = asked(r"\sqrt{8}", TOWER, r"2\sqrt{2}", TOWER)
    assert correct == [False, True, False]
    assert (opinion.num_asked, opinion.num_right, opinion.num_undecided) == (3, 1, 2)


def test_after_too_many_that_take_too_long_nothing_more_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(grading, "_MAX_UNDECIDED", 1)
    correct, opinion = asked(r"\sqrt{8}", TOWER, r"\sqrt{2}+\sqrt{2}")
    assert (correct, opinion.num_undecided) == ([False, False], 2)


def test_without_math_verify_canonical_forms_alone_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "serve.pair.answers.equivalence.importlib.util.find_spec", lambda name: None
    )
    correct, opinion = asked(r"\sqrt{8}", r"2\sqrt{2}", r"\sqrt 8")
    assert (correct, opinion) == ([False, True], SecondOpinion())
    assert opinion.describe() == describe_comparison(None)
    assert "math-verify (extra math) is not installed" in opinion.describe()
