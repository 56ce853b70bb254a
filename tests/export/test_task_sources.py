from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.config import BuiltinSource, ExportError, JsonlSource, ReasoningGymSource, TasksConfig
from export.task_sources import hash_sources, is_entry_solved, load_jsonl, load_tasks
from export.tasks import Task, builtin_tasks, normalise_prompt, prompt_id, split_of

Write = Callable[..., JsonlSource]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(row, row, name="a.jsonl")`: a source of these rows; a string is a line as it is."""

    def write(*rows: dict[str, Any] | str, name: str = "tasks.jsonl") -> JsonlSource:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return JsonlSource(kind="jsonl", path=path)

    return write


def load(*sources: Any, **settings: Any) -> list[Task]:
    return load_tasks(TasksConfig(sources=sources, **settings))


def held_out(prompt: str = "Held out?") -> dict[str, Any]:
    """A row that gives the test split its task."""
    return {"prompt": prompt, "split": "test"}


def rows(count: int, split: str, word: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}", "split": split} for i in range(count)]


# --- what is selected


def test_builtin_tasks_are_the_first_of_train_and_test() -> None:
    tasks = load(BuiltinSource(), max_train=30, max_test=5, seed=3)
    expected = [
        [task for task in builtin_tasks(3) if task.split == split][:limit]
        for split, limit in (("train", 30), ("test", 5))
    ]
    assert tasks == [*expected[0], *expected[1]]


def test_families_select_builtin_tasks() -> None:
    tasks = load(BuiltinSource(families=("add", "capital")))
    assert {task.family for task in tasks} == {"add", "capital"}


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExportError, match=r"no family 'sums'; valid: add, add_story, .*story"):
        load(BuiltinSource(families=("add", "sums")))


def test_validation_split_is_left_out(write: Write) -> None:
    unused = {"prompt": "Unused", "split": "validation"}
    tasks = load(write({"prompt": "Used", "split": "train"}, unused, held_out()))
    assert [task.prompt for task in tasks] == ["Used", "Held out?"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_without_a_task_is_refused(write: Write, split: str) -> None:
    other = "test" if split == "train" else "train"
    with pytest.raises(ExportError, match=f"no task of the {split} split"):
        load(write({"prompt": "Hello", "split": other}))


def test_every_source_keeps_its_share_when_cut(write: Write) -> None:
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


def test_prompt_of_two_sources_is_the_earlier_ones(write: Write) -> None:
    first = write({"prompt": "What is it?", "split": "train", "id": "a"}, held_out(), name="1")
    second = write({"prompt": "what is  IT", "split": "test", "id": "b"}, name="2")
    tasks = load(first, second)
    assert [task.task_id for task in tasks if "it" in task.prompt] == ["a"]


def test_no_prompt_straddles_splits_across_sources(write: Write) -> None:
    """Though the built-in set splits by operands, and a row by its own prompt."""
    spelled = [task.prompt.upper().replace(" ", "  ") for task in builtin_tasks()]
    source = write(*[{"prompt": prompt} for prompt in spelled])
    for sources in [(BuiltinSource(), source), (source, BuiltinSource())]:
        tasks = load(*sources, max_train=5000, max_test=5000)
        prompts = [normalise_prompt(task.prompt) for task in tasks]
        assert len(set(prompts)) == len(prompts)
        assert len({task.task_id for task in tasks}) == len(tasks)


def test_one_id_for_two_prompts_is_refused_across_sources(write: Write) -> None:
    first = write({"prompt": "One", "id": "x"}, name="1")
    second = write({"prompt": "Two", "id": "x"}, name="2")
    with pytest.raises(ExportError, match="two tasks have the id 'x'"):
        load(first, second)


# --- JSONL


def test_row_with_all_keys(write: Write) -> None:
    row = {
        "prompt": "2 + 1,000?", "answer": "1,002.0", "answer_format": "last_number",
        "id": "sum", "family": "sums", "split": "train",
    }  # fmt: skip
    task, _ = load(write(row, held_out()))
    assert task == Task("sum", "2 + 1,000?", "1002", "last_number", "sums", "train")


def test_row_with_a_prompt_alone(write: Write) -> None:
    tasks = load(write(*[{"prompt": f"Tell me about {i}."} for i in range(60)]))
    for task in tasks:
        assert (task.answer, task.answer_format, task.family) == (None, "none", "jsonl")
        assert task.task_id == prompt_id(task.prompt)
        assert task.split == split_of(normalise_prompt(task.prompt))
    assert {task.split for task in tasks} == {"train", "test"}


def test_answer_is_looked_for_in_the_final_line_by_default(write: Write) -> None:
    task, _ = load(write({"prompt": "Capital?", "answer": "Paris", "split": "train"}, held_out()))
    assert (task.answer, task.answer_format) == ("paris", "final_line")


def test_blank_lines_byte_order_mark_and_line_separators_are_no_rows(tmp_path: Path) -> None:
    train = '{"prompt": "Two\u2028lines", "split": "train"}'
    text = f"\ufeff{train}\n\n  \r\n{json.dumps(held_out())}\r\n"
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(text.encode())
    tasks = load(JsonlSource(kind="jsonl", path=path))
    assert [task.prompt for task in tasks] == ["Two\u2028lines", "Held out?"]


def test_repeated_prompt_with_the_same_answer_counts_once(write: Write) -> None:
    row = {"prompt": "Capital?", "answer": "Paris", "split": "train"}
    assert len(load(write(row, row | {"prompt": "capital"}, held_out()))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "the line: Invalid JSON"),
        ("[1]", "the line: .*object"),
        ("{}", "prompt: Field required"),
        ('{"prompt": " "}', "prompt: String should match"),
        ('{"prompt": 3}', "prompt: Input should be a valid string, got 3"),
        ('{"prompt": "a", "answer": 3}', "answer: Input should be a valid string, got 3"),
        ('{"prompt": "a", "answer": " "}', "answer: String should match"),
        ('{"prompt": "a", "id": ""}', "id: String should match"),
        ('{"prompt": "a", "family": null}', "family: Input should be a valid string"),
        ('{"prompt": "a", "split": "dev"}', "split: Input should be 'train', 'validation' or"),
        ('{"prompt": "a", "anwser": "b"}', "anwser: .*got 'b'; keys: prompt, answer, answer_form"),
        ('{"prompt": "a", "answer": "b", "answer_format": "json"}', "'json' is unknown; valid: no"),
        ('{"prompt": "a", "answer_format": "boxed"}', "answer_format 'boxed' needs an answer"),
        ('{"prompt": "a", "answer": "b", "answer_format": "none"}', "'b' can never be found"),
        ('{"prompt": "a", "answer": "b", "answer_format": "last_number"}', "reads it as None"),
        ('{"prompt": "a", "answer": "b\\nc"}', "'b\\\\nc' can never be found.*reads it as 'C'"),
        ('{"prompt": "a", "answer": "...", "answer_format": "boxed"}', "can never be found"),
        ('{"prompt": "other", "id": "first"}', "id 'first' is that of line 1 too"),
        ('{"prompt": "Held out", "split": "train"}', "line 1 has the same prompt with another"),
        ('{"prompt": "Held out?", "answer": "b", "split": "test"}', "line 1 has the same prompt"),
    ],
)
def test_wrong_row_is_refused_with_path_and_line(write: Write, line: str, message: str) -> None:
    source = write({**held_out(), "id": "first"}, "", line)
    with pytest.raises(ExportError, match=rf"tasks\.jsonl:3: .*{message}"):
        load(source)


def test_every_answer_format_takes_an_answer_of_its_kind(write: Write) -> None:
    answers = {"last_number": "3/4", "boxed": "x^2", "choice": "b", "final_line": "It is so."}
    given = [
        {"prompt": kind, "answer": answer, "answer_format": kind, "split": "train"}
        for kind, answer in answers.items()
    ]
    tasks = load(write(*given, held_out()))[:-1]
    assert [task.answer for task in tasks] == ["0.75", "x^2", "B", "it is so"]


def test_empty_file_is_refused(write: Write) -> None:
    with pytest.raises(ExportError, match=r"tasks\.jsonl:1: the file is empty"):
        load(write("  "))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    source = JsonlSource(kind="jsonl", path=tmp_path / "none.jsonl")
    for read in (load_tasks, hash_sources):
        with pytest.raises(ExportError, match=r"none\.jsonl cannot be read: No such file"):
            read(TasksConfig(sources=(source,)))


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ExportError, match=r"latin\.jsonl:2: not UTF-8"):
        load(JsonlSource(kind="jsonl", path=path))


# --- what a stage depends on


def test_hash_follows_the_content_of_the_files(write: Write) -> None:
    hashes = set()
    for words in (["a"], ["b"], ["a", "b"]):
        sources = tuple(write(held_out(word), name=f"{word}.jsonl") for word in words)
        hashes.add(hash_sources(TasksConfig(sources=sources)))
    config = TasksConfig(sources=(write(held_out("a"), name="moved.jsonl"),))
    assert len(hashes) == 3
    assert hash_sources(config) in hashes


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


@pytest.mark.parametrize("read", [load_tasks, hash_sources])
def test_missing_package_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[TasksConfig], Any]
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ExportError, match=r"pip install 'tandem\[reasoning-gym\]'"):
        read(TasksConfig(sources=(gym("chain_sum", seed=987),)))


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


def test_only_the_full_score_counts() -> None:
    for task in gym_tasks("chain_sum", seed=5):
        dataset, entry = gym_entry(task)
        assert 0 < dataset.score_answer(f"{task.answer}0", entry) < 1
        assert not is_entry_solved(task, f"That makes {task.answer}0.")
        assert is_entry_solved(task, f"That makes {task.answer}.")
        assert not is_entry_solved(task, "I do not know.")


def test_answer_of_several_lines_is_the_whole_text() -> None:
    task = gym_tasks("rotate_matrix", seed=5)[0]
    _, entry = gym_entry(task)
    assert "\n" in entry["answer"]
    assert is_entry_solved(task, f"{entry['answer']}\n")
    assert not is_entry_solved(task, entry["answer"].splitlines()[-1])


def test_task_without_a_single_answer_is_verifiable_all_the_same() -> None:
    task = gym_tasks("graph_color", seed=5)[0]
    _, entry = gym_entry(task)
    assert task.answer is None
    assert task.answer_format == "none"
    assert task.is_verifiable
    assert is_entry_solved(task, json.dumps(entry["metadata"]["possible_answer"]))
    assert not is_entry_solved(task, "{}")


def test_text_on_which_the_scorer_fails_is_wrong() -> None:
    task = gym_tasks("prime_factorization", seed=5)[0]
    dataset, entry = gym_entry(task)
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer("no idea", entry)
    assert not is_entry_solved(task, "no idea")
    assert is_entry_solved(task, f"It is\n{entry['answer']}")


def test_question_that_is_generated_otherwise_is_refused() -> None:
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
def test_dataset_that_cannot_be_created_is_refused(dataset: str, options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=rf"tasks\.sources: reasoning_gym dataset '{dataset}': "):
        gym_tasks(dataset, options=options)


def test_hash_takes_the_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    config = TasksConfig(sources=(gym("chain_sum"),))
    before = hash_sources(config)
    assert hash_sources(config) == before
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    assert hash_sources(config) != before


def test_key_of_a_row_steers_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "x\\u001b[2J": 1}\n', encoding="utf-8")
    with pytest.raises(ExportError, match="Extra inputs") as error:
        load_jsonl(path)
    assert str(error.value).isprintable()
