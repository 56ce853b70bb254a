"""Which folder is the teacher: the one that the student was distilled from, or one asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from bundle.hashing import hash_weights
from bundle.manifest import TeacherReference
from bundle.model_inputs import hash_model_inputs
from serve.app.config import ServeConfig
from serve.app.find_teacher import find_teacher
from tests.support.models.model_folders import TINY, write_model_folder

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"chat_template.jinja": "{{ messages }}", "README.md": "A model."}
    return write_model_folder(tmp_path / "teacher", TINY | {"rope_theta": 10_000.0}, **files)


def reference_to(folder: Path, **fields: Any) -> TeacherReference:
    described = {"source": "org/model", "architecture": "x", "num_parameters": 1, "dtype": "x"}
    hashes = {"weights_sha256": hash_weights(folder), "inputs": hash_model_inputs(folder)}
    return TeacherReference(**described | hashes | {"local_path": str(folder)} | fields)


def write(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def damage_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0")


ROPE = write("config.json", json.dumps(TINY | {"rope_theta": 500_000.0}))
TEMPLATE = write("chat_template.jinja", "{{ messages[0] }}")


def rope_and_weights(folder: Path) -> None:
    ROPE(folder)
    damage_weights(folder)


CHANGES = [
    (ROPE, "config.json"),
    (TEMPLATE, "chat_template.jinja"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja"),
    (write("added_tokens.json", '{"x": 16}'), "added_tokens.json"),
    (write("tokenizer.json", "{}"), "tokenizer.json"),
    (damage_weights, "the weights"),
    (rope_and_weights, "the weights, config.json"),
]
NO_CHANGES = [
    lambda folder: None,
    write("README.md", "Another text."),
    write("LICENSE", "x"),
    write("config.json", json.dumps(TINY | {"rope_theta": 10_000.0}, indent=4)),
]


@pytest.mark.parametrize("edit", NO_CHANGES)
@pytest.mark.parametrize("is_named", [False, True])
def test_teacher_that_is_as_it_was_is_served_silently(
    folder: Path, caplog: pytest.LogCaptureFixture, edit: Edit, is_named: bool
) -> None:
    reference = reference_to(folder, **{"local_path": "/nowhere"} if is_named else {})
    edit(folder)
    config = ServeConfig(bundle="x", teacher=folder if is_named else None)
    assert find_teacher(config, reference) == folder
    assert caplog.records == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"local_path": None}, "does not say where its teacher lies"),
        ({"local_path": "/nowhere"}, "no longer at /nowhere"),
        ({"local_path": "/" + "x" * 300}, "xxx cannot be read: File name too long"),
    ],
)
def test_teacher_that_cannot_be_had_leaves_the_student_alone_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], text: str
) -> None:
    assert find_teacher(ServeConfig(bundle="x"), reference_to(folder, **fields)) is None
    (record,) = caplog.records
    assert text in record.getMessage() and record.levelno == logging.WARNING


@pytest.mark.parametrize(("edit", "names"), CHANGES)
@pytest.mark.parametrize("is_named", [False, True])
def test_teacher_that_has_changed_is_served_if_it_is_named_and_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture, edit: Edit, names: str, is_named: bool
) -> None:
    reference = reference_to(folder)
    edit(folder)
    config = ServeConfig(bundle="x", teacher=folder if is_named else None)
    assert find_teacher(config, reference) == (folder if is_named else None)
    (warning,) = [record.getMessage() for record in caplog.records]
    if is_named:
        assert f"distilled from (org/model): it differs in {names}; divergences are" in warning
    else:
        assert f"has changed since the student was distilled: {names} in {folder};" in warning


def test_no_teacher_is_silent(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ServeConfig(bundle="x", no_teacher=True)
    assert find_teacher(config, reference_to(folder, weights_sha256="1" * 64)) is None
    assert caplog.records == []


@pytest.mark.parametrize("edit", [ROPE, TEMPLATE])
@pytest.mark.parametrize("is_named", [False, True])
def test_bundle_that_does_not_say_what_the_files_were_is_no_reason_to_warn(
    folder: Path, caplog: pytest.LogCaptureFixture, edit: Edit, is_named: bool
) -> None:
    reference = reference_to(folder, inputs=None)
    edit(folder)
    config = ServeConfig(bundle="x", teacher=folder if is_named else None)
    assert find_teacher(config, reference) == folder
    assert caplog.records == []


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda folder: folder.rename(folder.parent / "x"), "its teacher is no longer at"),
        (ROPE, "its teacher has changed since the student was distilled: config.json in"),
    ],
)
def test_teacher_alone_that_is_not_there_as_it_was_ends_the_start(
    folder: Path, edit: Edit, text: str
) -> None:
    reference = reference_to(folder)
    edit(folder)
    with pytest.raises(UserError, match=f"^--no-student: {text}"):
        find_teacher(ServeConfig(bundle="x", no_student=True), reference)


def test_names_of_files_cannot_break_out_of_the_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = {**hash_model_inputs(folder), "\n\x1b[2J": "0" * 64}
    (folder / "additional_chat_templates").mkdir()
    write("additional_chat_templates/\x1b[31m.jinja", "x")(folder)
    find_teacher(ServeConfig(bundle="x"), reference_to(folder, inputs=inputs))
    assert caplog.records[0].getMessage().isprintable()
