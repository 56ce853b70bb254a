from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle.errors import ModelFolderError
from bundle.model_inputs import hash_model_inputs

Edit = Callable[[Path], object]


def edit_json(name: str, **changes: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | changes, indent=8))

    return edit


def write(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    return edit


def append(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("chat_template.jinja", append("chat_template.jinja", " ")),
        ("config.json", edit_json("config.json", rope_theta=500_000.0)),
        ("config.json", edit_json("config.json", eos_token_id=[2, 3])),
        ("generation_config.json", edit_json("generation_config.json", eos_token_id=[2, 3])),
        ("tokenizer.json", edit_json("tokenizer.json", normalizer={"type": "NFKC"})),
        ("tokenizer_config.json", edit_json("tokenizer_config.json", bos_token=None)),
        ("special_tokens_map.json", edit_json("special_tokens_map.json", bos_token="x")),
        ("added_tokens.json", write("added_tokens.json")),
        ("chat_template.json", write("chat_template.json")),
        (
            "additional_chat_templates/tool.jinja",
            write("additional_chat_templates/tool.jinja"),
        ),
        ("generation_config.json", lambda folder: (folder / "generation_config.json").unlink()),
    ],
)
def test_what_shapes_ids_or_logits_is_an_input(folder: Path, name: str, edit: Edit) -> None:
    before = hash_model_inputs(folder)
    edit(folder)
    after = hash_model_inputs(folder)
    assert [n for n in {**before, **after} if before.get(n) != after.get(n)] == [name]


@pytest.mark.parametrize(
    "edit",
    [
        write("README.md"),
        write(".gitattributes"),
        write("vocab.json"),
        write("onnx/model.json"),
        edit_json("config.json"),
        edit_json("config.json", transformers_version="5.0.0", _name_or_path="elsewhere"),
        edit_json("generation_config.json", transformers_version="5.0.0"),
    ],
)
def test_what_shapes_nothing_is_no_input(folder: Path, edit: Edit) -> None:
    before = hash_model_inputs(folder)
    edit(folder)
    assert hash_model_inputs(folder) == before


def test_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "chat_template.json").symlink_to("/proc/self/mem")  # a plain file that fails to read
    with pytest.raises(ModelFolderError, match=r"chat_template.json cannot be read: Input/output"):
        hash_model_inputs(folder)


def test_name_that_cannot_be_printed_is_escaped(folder: Path) -> None:
    path = folder / "additional_chat_templates" / "a\udcff.jinja"  # bytes that are no UTF-8
    path.parent.mkdir()
    path.write_text("x")
    assert r"'additional_chat_templates/a\udcff.jinja'" in hash_model_inputs(folder)


def test_file_that_is_no_json_is_hashed_as_it_is(tmp_path: Path) -> None:
    hashes = set()
    for text in ("{", "{{", '{"a": NaN}', '{"a": "\\ud800"}'):
        (tmp_path / "config.json").write_text(text)
        hashes.add(hash_model_inputs(tmp_path)["config.json"])
    assert len(hashes) == 4
