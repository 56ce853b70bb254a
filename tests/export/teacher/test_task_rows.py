from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.run.errors import ExportError
from export.run.settings import JsonlSource, TasksConfig
from export.teacher.task_rows import TaskRowsError, read_rows
from export.teacher.task_sources import Loaded, load_jsonl, read_tasks
from export.teacher.tasks import Task, normalise_prompt, prompt_id, split_of
from tests.support.rows import write_rows

Write = Callable[..., Path]
HELD_OUT = {"prompt": "Held out?", "split": "test", "id": "first"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(row, row, name="a.jsonl")`: a file of these rows."""
    return lambda *rows, name="rows.jsonl": write_rows(tmp_path / name, *rows)


def read(*paths: Path, form: str = "auto", on_bad_row: str = "refuse") -> Loaded:
    sources = [{"kind": "jsonl", "path": path, "format": form} for path in paths]
    return read_tasks(TasksConfig.model_validate({"sources": sources, "on_bad_row": on_bad_row}))


def only(path: Path, form: str = "auto") -> Task:
    """The task of a file of one row."""
    (task,) = read_rows(path, form).tasks  # type: ignore[arg-type]
    return task.task


# --- the forms that data sets come in


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "answer_format"),
    [
        ({"prompt": "Capital?"}, "Capital?", None, "none"),
        ({"prompt": "Capital?", "answer": "Paris"}, "Capital?", "paris", "final_line"),
        ({"prompt": "Hello", "completion": "Hi."}, "Hello", None, "none"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": []}, "Hi", None, "none"),
        ({"instruction": "Sort.", "input": "3 1", "output": "1 3"}, "Sort.\n\n3 1", None, "none"),
        ({"instruction": "Sort.", "input": "", "output": "1"}, "Sort.", None, "none"),
        (
            {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"},
            "How many?", "18", "last_number",
        ),
        ({"question": "How much?", "answer": "So\n#### 1,080"}, "How much?", "1080", "last_number"),
        ({"question": "Capital?", "answer": "Paris"}, "Capital?", "paris", "final_line"),
        (
            {"problem": "x?", "solution": "So \\boxed{2}", "answer": "2", "answer_format": "boxed"},
            "x?", "2", "boxed",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
            "Hello", None, "none",
        ),
    ],
)  # fmt: skip
def test_row_form_is_known_by_its_columns(
    write: Write, row: dict[str, Any], prompt: str, answer: str | None, answer_format: str
) -> None:
    task = only(write(row))
    assert (task.prompt, task.answer, task.answer_format) == (prompt, answer, answer_format)
    assert (task.turns, task.task_id) == ((), prompt_id(prompt))
    assert task.split == split_of(normalise_prompt(prompt))


@pytest.mark.parametrize("last", [[], [{"role": "assistant", "content": "Not used."}]])
def test_chat_ends_with_the_last_turn_of_the_user(write: Write, last: list[Any]) -> None:
    chat = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Who?")]
    messages = [{"role": role, "content": content} for role, content in chat]
    path = write({"messages": messages + last})
    assert only(path).messages == tuple(chat)
    notes = read_rows(path).notes
    assert ("the last assistant's turn" in " ".join(notes)) is bool(last)


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("42", "42"),
        ("-3", "-3"),
        ("18.50", "18.5"),
        ("1e3", "1000"),
        ("true", "true"),
        ("null", None),
    ],
)
def test_row_answer_that_is_no_text_is_its_text(write: Write, raw: str, answer: str | None) -> None:
    assert only(write(f'{{"prompt": "How many?", "answer": {raw}, "id": 7}}')).answer == answer
    assert only(write(f'{{"prompt": "How many?", "answer": {raw}, "id": 7}}')).task_id == "7"


def test_row_columns_that_are_not_used_are_named_in_one_line(write: Write) -> None:
    rows = [
        {"prompt": "One", "level": 3, "source": "web"},
        {"prompt": "Two", "completion": "So.", "level": 4, "bad\nname": 1},
    ]
    path = write(*rows)
    (note,) = read_rows(path).notes
    assert note == (
        f"{path}: not used are level, source, completion, 'bad\\nname'; the teacher answers every "
        "prompt itself"
    )


def test_row_form_is_the_recipes_where_columns_do_not_decide(write: Write) -> None:
    row = {"prompt": "One", "question": "Two", "split": "train"}
    path = write(row, {"prompt": "a", "question": "b", "split": "test"})
    with pytest.raises(ExportError, match=r"rows\.jsonl:1: has prompt and question: say in the"):
        read(path)
    assert [task.prompt for task in read(path, form="question").tasks] == ["Two", "b"]
    assert [task.prompt for task in read(path, form="prompt").tasks] == ["One", "a"]


@pytest.mark.parametrize(
    "row",
    [{"text": "= Title ="}, {"context": "c", "answers": {"text": ["a"]}}, {"conversations": []}],
)
def test_row_form_that_is_unknown_is_one_line_with_the_known_ones(
    write: Write, row: dict[str, Any]
) -> None:
    with pytest.raises(ExportError) as refused:
        read(write(*[row] * 40))
    (line,) = str(refused.value).splitlines()
    assert "rows.jsonl:1: its columns" in line and next(iter(row)) in line
    assert "give prompt; messages; instruction with input; or question (or problem)" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n", r"rows\.jsonl:1: a JSON array over several lines"),
        ("PAR1...", r"rows\.jsonl is parquet; give JSON lines"),
        ("  \n", r"rows\.jsonl:1: the file is empty"),
    ],
)
def test_rows_of_another_kind_of_file_are_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read(write(text))


def test_rows_of_unreadable_files_are_refused_with_all_others(write: Write, tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(TaskRowsError) as refused:
        read(write("[1]"), latin, tmp_path / "none.jsonl")
    wrong, not_text, missing = refused.value.faults
    assert wrong.endswith("rows.jsonl:1: the line: [1] is no JSON object")
    assert not_text.startswith(f"{latin}:2: not UTF-8")
    assert missing == f"{tmp_path / 'none.jsonl'} cannot be read: No such file or directory"


def test_rows_are_no_blank_lines_byte_order_marks_or_separators(tmp_path: Path) -> None:
    train = '{"prompt": "Two\u2028lines", "split": "train"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\ufeff{train}\n\n  \r\n{json.dumps(HELD_OUT)}\r\n".encode())
    assert [task.prompt for task in read(path).tasks] == ["Two\u2028lines", "Held out?"]


def test_row_with_all_keys(write: Write) -> None:
    row = {
        "prompt": "2 + 1,000?", "answer": "1,002.0", "answer_format": "last_number",
        "id": "sum", "family": "sums", "split": "train",
    }  # fmt: skip
    task = only(write(row))
    assert task == Task("sum", "2 + 1,000?", "1002", "last_number", "sums", "train")


def test_row_answer_is_of_the_kind_of_its_format(write: Write) -> None:
    answers = {"last_number": "3/4", "boxed": "x^2", "choice": "b", "final_line": "It is so."}
    given = [
        {"prompt": kind, "answer": answer, "answer_format": kind, "split": "train"}
        for kind, answer in answers.items()
    ]
    tasks = read(write(*given, HELD_OUT)).tasks[:-1]
    assert [task.answer for task in tasks] == ["0.75", "x^2", "B", "it is so"]


# --- faulty rows


def chat(*turns: dict[str, Any]) -> str:
    return json.dumps({"messages": list(turns)})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "the line: not JSON: Expecting"),
        ("[1]", r"the line: \[1\] is no JSON object"),
        ("[" * 100_000, "the line: nested too deeply"),
        ('{"prompt": "\\ud800"}', "the line: half of a surrogate pair in it is no text"),
        ("{}", r"its columns \(none\) fit no form"),
        ('{"prompt": null}', "prompt: is null"),
        ('{"prompt": " "}', "prompt: is empty"),
        ('{"prompt": 3}', "prompt: is 3, not text"),
        ('{"prompt": "a", "answer": " "}', "answer: is empty"),
        ('{"prompt": "a", "answer": ["b"]}', r"answer: is \['b'\], not text"),
        ('{"prompt": "a", "answer": NaN}', "the line: not JSON: NaN is no number"),
        ('{"prompt": "a", "answer": "b", "answer": "c"}', "answer: is given twice"),
        ('{"prompt": "a", "id": ""}', "id: is empty"),
        ('{"prompt": "a", "split": "dev"}', "split: is 'dev'; valid: train, validation, test"),
        ('{"prompt": "a", "anwser": "b"}', "anwser: is no column; did you mean answer"),
        ('{"prompt": "a", "x\\u001b[2J": 1, "splt": 1}', "splt: is no column"),
        ('{"prompt": "a", "answer": "b", "answer_format": "json"}', "'json' is unknown; valid: no"),
        ('{"prompt": "a", "answer_format": "boxed"}', "answer_format 'boxed' needs one"),
        ('{"prompt": "a", "answer": "b", "answer_format": "none"}', "'b' can never be found"),
        ('{"prompt": "a", "answer": "b", "answer_format": "last_number"}', "reads it as None"),
        ('{"prompt": "a", "answer": "b\\nc"}', "'b\\\\nc' can never be found.*reads it as 'C'"),
        ('{"prompt": "other", "id": "first"}', "id 'first' is that of line 1 too"),
        ('{"prompt": "Held out", "split": "train"}', "line 1 has the same prompt, with another s"),
        ('{"prompt": "Held out?", "answer": "b", "split": "test"}', "the same prompt, with anot"),
        ('{"instruction": "a", "input": 3}', "input: is 3, not text"),
        ('{"messages": "Hello"}', "messages: is 'Hello', not a list of messages"),
        ('{"messages": []}', r"messages: is \[\], not a list"),
        (chat({"role": "system", "content": "a"}), "messages: has no user's turn at its end"),
        (chat({"role": "tool", "content": "a"}), r"messages\.0\.role: is 'tool'; valid: system"),
        (chat({"role": "user"}), r"messages\.0\.content: is None, not text"),
        (chat({"role": "user", "content": ""}), r"messages\.0\.content: is empty"),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}),
            r"messages\.0\.content: is \[\{'type': 'image_url'\}\], not text",
        ),
        (
            chat({"role": "user", "content": "a", "tool_calls": [1]}),
            r"messages\.0\.tool_calls: is not supported",
        ),
    ],
)  # fmt: skip
def test_row_that_is_faulty_is_refused_with_its_place_or_dropped(
    write: Write, line: str, message: str
) -> None:
    path = write(HELD_OUT, {"prompt": "Train", "split": "train"}, line)
    with pytest.raises(ExportError, match=rf"rows\.jsonl:3: .*({message})") as refused:
        read(path)
    assert str(refused.value).isprintable()
    loaded = read(path, on_bad_row="drop")
    assert [task.prompt for task in loaded.tasks] == ["Train", "Held out?"]
    assert "tasks.sources: 1 faulty rows are dropped:" in loaded.notes
    assert str(refused.value) in loaded.notes


def test_rows_that_are_faulty_are_named_at_once(write: Write) -> None:
    rows = [{"prompt": "a", "answer": []}, {"prompt": "", "split": "x"}, {"prompt": "c"}]
    first, second = write(*rows, name="1.jsonl"), write("{", {"prompt": "d"}, name="2.jsonl")
    with pytest.raises(TaskRowsError) as refused:
        read(first, second)
    places = [fault.partition(": ")[0] for fault in refused.value.faults]
    assert places == [f"{first}:1", f"{first}:2", f"{first}:2", f"{second}:1"]


def test_rows_of_many_faults_are_cut_and_counted(write: Write) -> None:
    with pytest.raises(TaskRowsError) as refused:
        load_jsonl(write(*[{"prompt": 1}] * 75))
    lines = str(refused.value).splitlines()
    assert (len(lines), lines[-1]) == (51, "and 25 more faults")


# --- which prompts are the same


@pytest.mark.parametrize(
    ("other", "is_repeat"),
    [
        ({"prompt": "What is  f(2)"}, True),
        ({"prompt": "what is f(2) ?"}, True),
        ({"prompt": "What is f'(2)?"}, False),
        ({"prompt": "What is F(2)?"}, False),
        ({"prompt": "What is f(2)!?"}, False),
        ({"prompt": "WHAT is f(2)?", "answer": "5"}, False),
        ({"prompt": "What is f(2)?", "family": "other"}, True),
    ],
)
def test_rows_of_one_meaning_are_one_and_counted(
    write: Write, other: dict[str, Any], is_repeat: bool
) -> None:
    row = {"prompt": "What is f(2)?", "answer": "4"}
    path = write(row | {"split": "train"}, row | {"split": "train"} | other, HELD_OUT)
    loaded = read(path)
    assert len(loaded.tasks) == 3 - is_repeat
    assert len({task.task_id for task in loaded.tasks}) == len(loaded.tasks)
    assert ("tasks.sources: 1 repeated prompts are left out" in loaded.notes) is is_repeat


def test_rows_that_are_alike_have_their_own_answers_and_one_split(write: Write) -> None:
    path = write({"prompt": "f(2)?", "answer": "4"}, {"prompt": "f'(2)?", "answer": "1"})
    first, second = load_jsonl(path)
    assert (first.answer, second.answer) == ("4", "1")
    assert first.task_id == prompt_id("f(2)?") != second.task_id
    assert first.split == second.split


def test_rows_that_are_alike_keep_their_explicit_splits(write: Write) -> None:
    path = write({"prompt": "f(2)?", "split": "train"}, {"prompt": "f'(2)?", "split": "test"})
    assert [task.split for task in read(path).tasks] == ["train", "test"]


def test_rows_that_are_alike_share_the_split_of_the_first_file(write: Write) -> None:
    hashed = split_of(normalise_prompt("f'(2)?"))
    other = "test" if hashed == "train" else "train"
    first = write({"prompt": "f(2)?", "split": other}, name="1")
    second = write({"prompt": "f'(2)?"}, {"prompt": "a", "split": hashed}, name="2")
    splits = {task.prompt: task.split for task in read(first, second).tasks}
    assert splits["f(2)?"] == splits["f'(2)?"] == other


def test_row_places_are_file_and_line(write: Write) -> None:
    path = write(HELD_OUT, {"prompt": "One", "split": "train", "id": "one"})
    assert read(path).places == {"first": f"{path}:1", "one": f"{path}:2"}


def test_source_takes_the_format_from_the_recipe() -> None:
    with pytest.raises(ValueError, match="'prompt', 'messages', 'instruction' or 'question'"):
        JsonlSource.model_validate({"kind": "jsonl", "path": "x", "format": "squad"})
