from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from export.config import ExportConfig
from export.model_files import copy_tokenizer, write_variant_files
from export.tasks import builtin_tasks


def make_config(**tasks: int) -> ExportConfig:
    settings: dict[str, Any] = {"teacher": "x", "output_dir": "y", "tasks": tasks}
    return ExportConfig.model_validate(settings)


# --- tasks


def test_tasks_are_cut_to_so_many_of_each_split() -> None:
    tasks = select_tasks(make_config(max_train=30, max_test=5))
    assert Counter(task.split for task in tasks) == {"train": 30, "test": 5}


def test_smaller_cut_is_the_beginning_of_a_larger_one() -> None:
    few = select_tasks(make_config(max_train=10, max_test=3))
    many = select_tasks(make_config(max_train=20, max_test=6))
    assert few == [*many[:10], *many[20:23]]


def test_limits_beyond_the_set_take_all_but_the_validation_split() -> None:
    tasks = select_tasks(make_config(max_train=10**6, max_test=10**6))
    expected = [task for task in builtin_tasks() if task.split != "validation"]
    assert {task.task_id for task in tasks} == {task.task_id for task in expected}


def test_seed_changes_the_tasks() -> None:
    first, other = (select_tasks(make_config(seed=seed, max_train=30)) for seed in (0, 1))
    assert first != other


# --- tokenizer files


def test_chat_template_is_found_in_either_place(tiny_teacher: Path, tmp_path: Path) -> None:
    """Older folders, those of most Hugging Face ids, keep it in tokenizer_config.json."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "generation_config.json"):
        (source / name).write_bytes((tiny_teacher / name).read_bytes())
    template = (tiny_teacher / "chat_template.jinja").read_text()
    config = json.loads((tiny_teacher / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    copy_tokenizer(source, target)
    assert (target / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize("is_there", [True, False])
def test_teacher_may_lack_a_generation_config(
    tiny_teacher: Path, tmp_path: Path, is_there: bool
) -> None:
    """Where it does, the one that transformers saved with the student stays."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for path in tiny_teacher.iterdir():
        if is_there or path.name != "generation_config.json":
            (source / path.name).write_bytes(path.read_bytes())
    (target / "generation_config.json").write_text('{"eos_token_id": 99}')
    copy_tokenizer(source, target)
    eos = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    assert eos == (2 if is_there else 99)


def test_tokenizer_files_of_the_student_are_those_of_the_teacher(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    copy_tokenizer(tiny_teacher, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tiny_teacher / path.name).read_bytes()
    (tmp_path / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    (tmp_path / "variant").mkdir()
    write_variant_files(tmp_path, tmp_path / "variant", 64)
