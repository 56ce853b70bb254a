from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from estimators.answers import ANSWER_FORMATS
from estimators.canonical import canonicalise
from export.teacher.tasks import builtin_tasks
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt
from loadtest.workload.dataset import load_prompts


def load(dataset: str | Path, **settings: Any) -> list[DatasetPrompt]:
    return load_prompts(RunConfig(out=Path("run"), dataset=str(dataset), **settings))


def test_builtin_prompts_are_the_verifiable_ones_that_no_student_was_trained_on() -> None:
    prompts = load("builtin")
    split_of = {task.task_id: task.split for task in builtin_tasks()}
    assert len(prompts) > 50
    assert {split_of[prompt.prompt_id] for prompt in prompts} == {"test"}
    assert all(p.reference_answer == canonicalise(p.reference_answer) for p in prompts)
    assert {p.answer_format for p in prompts} <= set(ANSWER_FORMATS) - {"none"}
    assert None not in {p.reference_answer for p in prompts}


def test_seed_of_the_run_leaves_builtin_prompts_as_they_are() -> None:
    assert load("builtin", seed=1) == load("builtin", seed=0)


def test_chat_of_several_turns_is_refused(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match="chat of several turns; a load test sends single prompts"):
        load(tmp_path / "chats.jsonl")


def test_first_prompts_are_kept_where_there_are_more() -> None:
    assert load("builtin", max_prompts=5) == load("builtin")[:5]


def test_file_is_read_whatever_the_split_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows: list[dict[str, str]] = [
        {"prompt": "What is 2 + 3?", "answer": "5.0", "answer_format": "last_number", "id": "sum"},
        {"prompt": "Name a colour.", "split": "train", "id": "colour"},
        {"prompt": "Name a bird.", "split": "validation", "id": "bird"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load(path) == [
        DatasetPrompt("sum", "What is 2 + 3?", "5", "last_number"),
        DatasetPrompt("colour", "Name a colour."),
        DatasetPrompt("bird", "Name a bird."),
    ]
    assert [prompt.prompt_id for prompt in load(path, max_prompts=2)] == ["sum", "colour"]


def test_broken_row_is_named_by_path_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "What is 2 + 3?"}\n{"prompt": "Why?", "anser": "5"}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2: anser")):
        load(path)


def test_synthetic_prompts_have_the_lengths_asked_for() -> None:
    prompts = load("synthetic:32x16", max_prompts=10)
    assert [len(prompt.text.split()) for prompt in prompts] == [32] * 10
    assert {(p.max_tokens, p.ignore_eos, p.reference_answer) for p in prompts} == {(16, True, None)}
    assert len({prompt.text for prompt in prompts}) == 10
    assert len({prompt.prompt_id for prompt in prompts}) == 10


def test_seed_decides_the_words() -> None:
    assert load("synthetic:32x16", seed=3) == load("synthetic:32x16", seed=3)
    assert load("synthetic:32x16", seed=3) != load("synthetic:32x16", seed=4)


@pytest.mark.parametrize("lengths", ["", "32", "0x16", "32x0", "32x16x8", "-1x2", "ax2"])
def test_wrong_lengths_are_refused(lengths: str) -> None:
    with pytest.raises(UserError, match="lengths are PROMPT_WORDSxMAX_TOKENS"):
        load(f"synthetic:{lengths}")


def test_dataset_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file; give one of JSON lines, builtin, or synth"):
        load(tmp_path / "missing.jsonl")
