from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import pytest

from estimators.answers import ANSWER_FORMATS, extract, is_correct
from estimators.canonical import canonicalise
from export.teacher.tasks import (
    GymEntry,
    Task,
    builtin_tasks,
    normalise_prompt,
    prompt_id,
    split_of,
)

TASKS = builtin_tasks()
VERIFIABLE = [task for task in TASKS if task.answer is not None]


@pytest.mark.parametrize(
    ("split", "share"), [("train", 0.85), ("validation", 0.05), ("test", 0.10)]
)
def test_builtin_tasks_are_two_thousand_in_shares_with_both_kinds(split: str, share: float) -> None:
    tasks = [task for task in TASKS if task.split == split]
    verifiable = sum(task.answer is not None for task in tasks)
    assert 0.2 < verifiable / len(tasks) < 0.5
    assert len(tasks) / len(TASKS) == pytest.approx(share, abs=0.03)
    assert 1500 <= len(TASKS) <= 2500
    assert 0.30 <= len(VERIFIABLE) / len(TASKS) <= 0.40


def test_builtin_tasks_have_no_prompt_twice_even_in_another_spelling() -> None:
    assert len({normalise_prompt(task.prompt) for task in TASKS}) == len(TASKS)
    assert all(task.task_id == prompt_id(task.prompt) for task in TASKS)


def test_builtin_tasks_follow_from_the_seed_which_moves_no_prompt_to_another_split() -> None:
    assert builtin_tasks() == TASKS
    split_of_prompt = {normalise_prompt(task.prompt): task.split for task in TASKS}
    others = {normalise_prompt(task.prompt): task.split for task in builtin_tasks(seed=1)}
    shared = split_of_prompt.keys() & others.keys()
    assert 0.1 < len(shared) / len(TASKS) < 0.9
    assert all(split_of_prompt[prompt] == others[prompt] for prompt in shared)


def test_builtin_near_duplicates_share_a_split() -> None:
    splits = defaultdict(set)
    for task in TASKS:
        if task.family in ("capital", "opposite", "plural"):
            splits[task.answer].add(task.split)
    assert max(len(found) for found in splits.values()) == 1


def test_split_of_keys_has_the_shares_of_splits() -> None:
    shares = Counter(split_of(str(i)) for i in range(20_000))
    assert shares["test"] / 20_000 == pytest.approx(0.10, abs=0.01)
    assert shares["validation"] / 20_000 == pytest.approx(0.05, abs=0.01)


def test_builtin_answers_are_canonical_and_found_by_their_own_extractor() -> None:
    for task in VERIFIABLE:
        assert task.answer is not None
        assert canonicalise(task.answer) == task.answer
        assert is_correct(extract(task.answer, task.answer_format), task.answer), task


def test_free_prompts_name_no_extractor() -> None:
    assert {task.answer_format for task in TASKS if task.answer is None} == {"none"}
    assert {task.answer_format for task in TASKS} <= set(ANSWER_FORMATS)


def test_free_prompts_cover_many_topics() -> None:
    families = Counter(task.family for task in TASKS if task.answer is None)
    assert len(families) >= 15
    assert families["explain"] >= 2 * 150


def test_builtin_prompts_are_short_plain_sentences() -> None:
    for task in TASKS:
        assert 5 < len(task.prompt) < 250, task
        assert "{" not in task.prompt
        assert task.prompt == task.prompt.strip()
        assert not task.prompt[0].islower(), task


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("What is 2 + 3?", " what is 2+3 ", True),
        ("Say “hello”.", "say hello", True),
        ("(1 + 2) * 3", "1 + (2 * 3)", False),
        ("Round 2.5", "Round 2 5", False),
        ("Is x = y?", "Is x ≠ y?", False),
        ("10 - 3", "10 + 3", False),
    ],
)
def test_prompts_that_read_the_same_are_one(one: str, other: str, are_equal: bool) -> None:
    assert (normalise_prompt(one) == normalise_prompt(other)) is are_equal
    assert (prompt_id(one) == prompt_id(other)) is are_equal


def test_task_is_verifiable_by_its_answer_or_by_reasoning_gym() -> None:
    task = Task("id", "Hello?", None, "none", "chat", "train")
    entry = GymEntry("graph_color", 10, 0, "{}", 3)
    assert not task.is_verifiable
    assert dataclasses.replace(task, answer="4").is_verifiable
    assert dataclasses.replace(task, gym_entry=entry).is_verifiable
