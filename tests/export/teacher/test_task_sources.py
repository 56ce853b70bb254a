from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.run.errors import ExportError
from export.run.settings import BuiltinSource, JsonlSource, ReasoningGymSource, TasksConfig
from export.teacher.task_sources import is_entry_solved, read_tasks, scorer_version
from export.teacher.tasks import Task, builtin_tasks, normalise_prompt, split_of
from tests.support.rows import write_rows

Write = Callable[..., JsonlSource]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(row, row, name="a.jsonl")`: a source of these rows."""
    return lambda *rows, name="tasks.jsonl": JsonlSource(
        kind="jsonl", path=write_rows(tmp_path / name, *rows)
    )


def load(*sources: Any, **settings: Any) -> list[Task]:
    return list(read_tasks(TasksConfig(sources=sources, **settings)).tasks)


def held_out(prompt: str = "Held out?") -> dict[str, Any]:
    """A row that gives the test split its task."""
    return {"prompt": prompt, "split": "test"}


def rows(count: int, split: str, word: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}", "split": split} for i in range(count)]


# --- what is selected


def test_load_tasks_takes_the_first_builtin_tasks_of_train_and_test() -> None:
    tasks = load(BuiltinSource(), max_train=30, max_test=5, seed=3)
    expected = [
        [task for task in builtin_tasks(3) if task.split == split][:limit]
        for split, limit in (("train", 30), ("test", 5))
    ]
    assert tasks == [*expected[0], *expected[1]]


def test_load_tasks_takes_the_families_asked_for() -> None:
    tasks = load(BuiltinSource(families=("add", "capital")))
    assert {task.family for task in tasks} == {"add", "capital"}


def test_load_tasks_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(ExportError, match=r"no family 'sums'; valid: add, add_story, .*story"):
        load(BuiltinSource(families=("add", "sums")))


def test_load_tasks_leaves_the_validation_split_out(write: Write) -> None:
    unused = {"prompt": "Unused", "split": "validation"}
    tasks = load(write({"prompt": "Used", "split": "train"}, unused, held_out()))
    assert [task.prompt for task in tasks] == ["Used", "Held out?"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_load_tasks_without_a_task_of_a_split_is_refused(write: Write, split: str) -> None:
    other = "test" if split == "train" else "train"
    with pytest.raises(ExportError, match=f"no task of the {split} split"):
        load(write({"prompt": "Hello", "split": other}))


def test_load_tasks_keeps_the_share_of_every_source_when_cut(write: Write) -> None:
    large = write(*rows(30, "train", "large"), *rows(6, "test", "large test"), name="a.jsonl")
    small = write(*rows(10, "train", "small"), *rows(2, "test", "small test"), name="b.jsonl")
    tasks = load(large, small, max_train=8, max_test=4)
    shares = Counter((task.split, task.prompt.split()[0]) for task in tasks)
    assert shares == {
        ("train", "large"): 6,
        ("train", "small"): 2,
        ("test", "large"): 3,
        ("test", "small"): 1,
    }


def test_load_tasks_takes_a_prompt_of_two_sources_from_the_earlier(write: Write) -> None:
    first = write({"prompt": "What is it?", "split": "train", "id": "a"}, held_out(), name="1")
    second = write({"prompt": "what is  IT", "split": "test", "id": "b"}, name="2")
    tasks = load(first, second)
    assert [task.task_id for task in tasks if "it" in task.prompt] == ["a"]


def test_load_tasks_keeps_a_prompt_in_one_split_across_sources(write: Write) -> None:
    """Though the built-in set splits by operands, and a row by its own prompt."""
    spelled = [task.prompt.upper().replace(" ", "  ") for task in builtin_tasks()]
    source = write(*[{"prompt": prompt} for prompt in spelled])
    for sources in [(BuiltinSource(), source), (source, BuiltinSource())]:
        tasks = load(*sources, max_train=5000, max_test=5000)
        splits = {(normalise_prompt(task.prompt), task.split) for task in tasks}
        assert len({prompt for prompt, _ in splits}) == len(splits)
        assert len({task.task_id for task in tasks}) == len(tasks)


def test_load_tasks_of_one_id_for_two_prompts_is_refused(write: Write) -> None:
    first = write({"prompt": "One", "id": "x"}, name="1")
    second = write({"prompt": "Two", "id": "x"}, name="2")
    with pytest.raises(ExportError, match="two tasks have the id 'x'"):
        load(first, second)


# --- reasoning-gym


def gym(dataset: str, **settings: Any) -> ReasoningGymSource:
    return ReasoningGymSource(kind="reasoning_gym", dataset=dataset, **settings)


def gym_tasks(dataset: str, **settings: Any) -> list[Task]:
    pytest.importorskip("reasoning_gym")
    return load(gym(dataset, size=40, **settings))


def gym_entry(task: Task) -> tuple[Any, dict[str, Any]]:
    """The dataset and the entry of a task, built without the code under test."""
    entry = task.gym_entry
    assert entry is not None
    create = pytest.importorskip("reasoning_gym").create_dataset
    options = json.loads(entry.options)
    dataset = create(entry.dataset, size=entry.size, seed=entry.seed, **options)
    return dataset, dataset[entry.index]


def test_load_tasks_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ExportError, match=r"pip install 'tandem\[reasoning-gym\]'"):
        read_tasks(TasksConfig(sources=(gym("chain_sum", seed=987),)))


def test_gym_tasks_come_with_answer_split_and_json_entry() -> None:
    tasks = gym_tasks("chain_sum", seed=5, options={"max_terms": 3})
    for task in tasks:
        dataset, entry = gym_entry(task)
        assert (task.prompt, task.answer) == (entry["question"], entry["answer"])
        assert dataset.config.max_terms == 3
        assert (task.answer_format, task.family) == ("last_number", "chain_sum")
        assert task.split == split_of(normalise_prompt(task.prompt))
        assert json.loads(json.dumps(dataclasses.asdict(task))) == dataclasses.asdict(task)
    assert {task.split for task in tasks} == {"train", "test"}


def test_gym_entry_is_solved_by_the_full_score_alone() -> None:
    for task in gym_tasks("chain_sum", seed=5):
        dataset, entry = gym_entry(task)
        assert 0 < dataset.score_answer(f"{task.answer}0", entry) < 1
        assert not is_entry_solved(task, f"That makes {task.answer}0.")
        assert is_entry_solved(task, f"That makes {task.answer}.")
        assert not is_entry_solved(task, "I do not know.")


def test_gym_entry_of_several_lines_is_solved_by_the_whole_text() -> None:
    task = gym_tasks("rotate_matrix", seed=5)[0]
    _, entry = gym_entry(task)
    assert "\n" in entry["answer"]
    assert is_entry_solved(task, f"{entry['answer']}\n")
    assert not is_entry_solved(task, entry["answer"].splitlines()[-1])


def test_gym_task_without_a_single_answer_is_verifiable() -> None:
    task = gym_tasks("graph_color", seed=5)[0]
    _, entry = gym_entry(task)
    assert task.answer is None
    assert task.answer_format == "none"
    assert task.is_verifiable
    assert is_entry_solved(task, json.dumps(entry["metadata"]["possible_answer"]))
    assert not is_entry_solved(task, "{}")


def test_gym_entry_is_not_solved_by_text_on_which_its_scorer_fails() -> None:
    task = gym_tasks("prime_factorization", seed=5)[0]
    dataset, entry = gym_entry(task)
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer("no idea", entry)
    assert not is_entry_solved(task, "no idea")
    assert is_entry_solved(task, f"It is\n{entry['answer']}")


def test_gym_entry_that_is_generated_otherwise_is_refused() -> None:
    task = dataclasses.replace(gym_tasks("chain_sum", seed=5)[0], prompt="What is 1 + 1?")
    with pytest.raises(ExportError, match=r"chain_sum\[\d+\] is another question"):
        is_entry_solved(task, "2")


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("chain_sums", {}),
        ("chain_sum", {"num_terms": 3}),
        ("chain_sum", {"seed": 3}),
        ("chain_sum", {"min_terms": 0}),
    ],
)
def test_gym_dataset_that_cannot_be_created_is_refused(
    dataset: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ExportError, match=rf"tasks\.sources: reasoning_gym dataset '{dataset}': "):
        gym_tasks(dataset, options=options)


def test_scorer_version_counts_where_scorers_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scorer_version(TasksConfig()) is None
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    assert scorer_version(TasksConfig(sources=(gym("chain_sum"),))) == "reasoning-gym 99"
