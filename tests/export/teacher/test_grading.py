"""Right and wrong completions: by canonical form, by reasoning-gym, by math-verify's opinion."""

from __future__ import annotations

from typing import Any

import pytest

from export.run.settings import ReasoningGymSource, TasksConfig
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


def asked(*pairs: tuple[str, str], **settings: Any) -> tuple[list[bool | None], SecondOpinion]:
    """Have pairs of a task's answer and another one judged by a single worker."""
    tasks = [boxed(answer) for answer, _ in pairs]
    grades = [
        grade(task, rf"\boxed{{{other}}}") for task, (_, other) in zip(tasks, pairs, strict=True)
    ]
    graded, opinion = ask_second_opinion(tasks, grades, **settings)
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


def test_grade_of_reasoning_that_nothing_ends_is_wrong() -> None:
    task = boxed("4")
    assert grade(task, r"\boxed{4}") == Grade(True, "4")
    assert grade(task, r"\boxed{4}", starts_in_reasoning=True) == Grade(False)
    assert grade(task, r"\boxed{5}</think>\boxed{4}", starts_in_reasoning=True) == Grade(True, "4")


def test_grade_of_a_reasoning_gym_task_is_its_own() -> None:
    pytest.importorskip("reasoning_gym")
    source = ReasoningGymSource(kind="reasoning_gym", dataset="chain_sum", size=40, seed=5)
    task = read_tasks(TasksConfig(sources=(source,))).tasks[0]
    assert grade(task, f"It is +{task.answer}.00").is_correct is True
    assert grade(task, f"<think>1</think>It is {task.answer}").is_correct is True
    assert grade(task, f"It is {task.answer}1").is_correct is False


def test_second_opinion_finds_equivalent_answers_right_whichever_stands_first() -> None:
    pairs = [("x<5", r"(-\infty,5)"), (r"2\sqrt{2}", r"\sqrt{8}"), ("x+y=3", "y=3-x")]
    pairs += [pair[::-1] for pair in pairs]
    correct, opinion = asked(*pairs, *((answer, "7") for answer, _ in pairs))
    assert correct == [True] * 6 + [False] * 6
    assert opinion.num_right == 6


def test_second_opinion_leaves_wrong_what_math_verify_takes_for_equal_and_is_not() -> None:
    pairs = [
        ("y=2x+3", "2x+3"),
        ("1010_2", "1010"),
        ("f(2)", "f'(2)"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("(1,2)", r"\{1,2\}"),
        ("3.1415926", r"\pi"),
        ("x+1\\text{ cm}", "1+x\\text{ m}"),
        ("on", "no"),
    ]
    for direction in (1, -1):
        correct, _ = asked(*(pair[::direction] for pair in pairs))
        assert [pair for pair, is_right in zip(pairs, correct, strict=True) if is_right] == []


def test_second_opinion_that_takes_too_long_leaves_the_answer_wrong_and_is_counted() -> None:
    root = r"\sqrt{8}"
    correct, opinion = asked((root, TOWER), (root, r"2\sqrt{2}"), (root, TOWER), timeout_s=0.5)
    assert correct == [False, True, False]
    assert (opinion.num_asked, opinion.num_right, opinion.num_undecided) == (3, 1, 2)


def test_second_opinion_is_not_asked_after_too_many_that_took_too_long() -> None:
    pairs = [(r"\sqrt{8}", TOWER), (r"\sqrt{8}", r"\sqrt{2}+\sqrt{2}")]
    correct, opinion = asked(*pairs, timeout_s=1.0, max_undecided=1)
    assert (correct, opinion.num_undecided) == ([False, False], 2)


def test_second_opinion_without_math_verify_is_the_canonical_forms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "serve.pair.answers.equivalence.importlib.util.find_spec", lambda name: None
    )
    correct, opinion = asked((r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{8}", r"\sqrt 8"))
    assert (correct, opinion) == ([False, True], SecondOpinion())
    assert opinion.describe() == describe_comparison(None)
    assert "math-verify (extra math) is not installed" in opinion.describe()
