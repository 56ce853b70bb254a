from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.export.cli import run, stages_of, stub_package, write_rows_recipe
from tests.support.random_models import random_model


@pytest.fixture
def begun(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[Path]]:
    """A recipe whose run began, with a teacher of its own, and where runs got packaged."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    recipe = write_rows_recipe(tmp_path, teacher)
    packaged = stub_package(monkeypatch)
    assert run("run", recipe) == 0
    return recipe, packaged


def test_resume_goes_on_with_the_recorded_run(
    begun: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, packaged = begun
    monkeypatch.chdir(recipe.parent)
    assert run("resume", "run") == 0
    assert packaged == [recipe.parent / "run"] * 2


@pytest.mark.parametrize("what", ["recipe", "JSONL source", "teacher"])
def test_resume_refuses_another_input_and_names_both_hashes(
    begun: tuple[Path, list[Path]],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    recipe, packaged = begun
    folder = recipe.parent
    if what == "teacher":
        random_model(seed=1).save_pretrained(folder / "teacher")
        changed = folder / "teacher"
    else:
        changed = recipe if what == "recipe" else folder / "tasks.jsonl"
        changed.write_text(changed.read_text() + "\n")
    assert run("resume", folder / "run") == 4
    shown = capsys.readouterr().err
    digits = "[0-9a-f]{12}"
    assert re.search(
        rf"the {what} {changed} had sha256 {digits} when .*, now it has sha256 {digits}:", shown
    )
    assert f"`tandem export run {recipe}`" in shown
    assert len(packaged) == 1


def set_rope_theta(teacher: Path) -> None:
    raw = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("chat_template.jinja", lambda teacher: (teacher / "chat_template.jinja").write_text("x")),
        ("config.json", set_rope_theta),
    ],
)
def test_file_of_the_teacher_edited_between_two_runs_is_told_by_every_command(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], name: str, edit: Any
) -> None:
    recipe, packaged = begun
    teacher, output_dir = recipe.parent / "teacher", recipe.parent / "run"
    assert run("sample", recipe) == 0
    edit(teacher)
    told = f"{name} of the teacher {teacher} had sha256 "
    capsys.readouterr()
    assert run("resume", output_dir) == 4
    assert told in capsys.readouterr().err
    assert run("status", output_dir) == 0
    assert f"changed: {told}" in capsys.readouterr().out
    assert run("status", recipe) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sample +to run", shown) and f"changed: {told}" in shown
    assert run("sample", recipe) == 0
    assert f"changed: {told}" in capsys.readouterr().out
    assert stages_of(recipe) == ["sample", "sample"], "that of the old file was not taken"
    assert run("resume", output_dir) == 0
    assert len(packaged) == 2


def test_status_says_nothing_of_inputs_that_are_as_they_were(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = begun
    (recipe.parent / "teacher" / "README.md").write_text("A teacher.")
    for path in (recipe, recipe.parent / "run"):
        assert run("status", path) == 0
        assert "changed" not in capsys.readouterr().out


def test_status_names_weights_that_changed_and_a_teacher_that_is_gone(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = begun
    teacher = recipe.parent / "teacher"
    random_model(seed=1).save_pretrained(teacher)
    assert run("status", recipe.parent / "run") == 0
    assert f"changed: the teacher {teacher} had sha256" in capsys.readouterr().out
    shutil.rmtree(teacher)
    assert run("status", recipe.parent / "run") == 0
    assert "now it is gone" in capsys.readouterr().out


def test_resume_refuses_a_recipe_that_is_gone(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = begun
    recipe.unlink()
    assert run("resume", recipe.parent / "run") == 4
    assert "now it is gone" in capsys.readouterr().err


def test_run_starts_a_changed_recipe_that_resume_then_goes_on_with(
    begun: tuple[Path, list[Path]],
) -> None:
    recipe, packaged = begun
    recipe.write_text(recipe.read_text() + "gates: {student_kl: 9}\n")
    assert run("run", recipe) == run("resume", recipe.parent / "run") == 0
    assert len(packaged) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no run began there"), ("{}", "is damaged or of another version")],
)
def test_folder_without_a_run_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    for command in ("resume", "status"):
        assert run(command, tmp_path) == 1
        shown = capsys.readouterr().err
        assert message in shown
        assert "tandem export run RECIPE" in shown


def test_missing_jsonl_source_is_named(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_rows_recipe(tmp_path, tiny_teacher)
    (recipe.parent / "tasks.jsonl").unlink()
    assert run("run", recipe) == 1
    assert "tasks.jsonl cannot be read: No such file" in capsys.readouterr().err
