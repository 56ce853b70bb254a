"""EOS, BOS and pad in every form in which they are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from bundle.errors import ModelFolderError
from bundle.token_ids import TokenIds, read_eos_token_ids, read_token_ids

GENERATION, CONFIG = "generation_config.json", "config.json"
LLAMA_3_2 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({CONFIG: {"eos_token_id": 2}}, TokenIds((2,), None, None)),
        (
            {CONFIG: {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}},
            TokenIds((2,), 1, 0),
        ),
        (
            {GENERATION: LLAMA_3_2, CONFIG: {"bos_token_id": 128000, "eos_token_id": 128001}},
            TokenIds((128001, 128008, 128009), 128000, None),
        ),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": [5, 2, 5]}},
         TokenIds((5, 2), None, None)),
        ({GENERATION: {"pad_token_id": 7}, CONFIG: {"eos_token_id": 2, "pad_token_id": 0}},
         TokenIds((2,), None, 7)),
        ({CONFIG: {"eos_token_id": 2, "pad_token_id": -1}}, TokenIds((2,), None, None)),
        ({CONFIG: {"eos_token_id": 2, "pad_token_id": 200_000}}, TokenIds((2,), None, None)),
        ({CONFIG: {}}, TokenIds((), None, None)),
    ],
)  # fmt: skip
def test_ids_come_from_the_generation_config_first(
    tmp_path: Path, files: dict[str, Any], expected: TokenIds
) -> None:
    assert read_token_ids(write(tmp_path, files), vocab_size=150_000) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "</s>"}},
        {"tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}}},
        {"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "</s>"}},
        {"special_tokens_map.json": {"eos_token": {"content": "</s>", "special": True}}},
    ],
)  # fmt: skip
def test_eos_that_only_the_tokenizer_names_is_looked_up(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, {CONFIG: {}, **files})
    assert read_eos_token_ids(tmp_path) == {2}


def test_eos_that_is_no_token_of_the_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {CONFIG: {}, "tokenizer_config.json": {"eos_token": "</s>"}})
    with pytest.raises(ModelFolderError, match=r"eos_token '</s>' is no token of tokenizer.json"):
        read_token_ids(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError, match=r"tokenizer.json cannot be read: "):
        read_token_ids(tmp_path)


def test_model_without_an_eos_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    write(tmp_path, {CONFIG: {}})
    with pytest.raises(ModelFolderError, match="no completion would ever end"):
        read_eos_token_ids(tmp_path)


@pytest.mark.parametrize("value", ["2", [], [[2]], True, -1, {"2": 0}, 16, [2, 16]])
def test_eos_that_is_no_token_id_is_refused(tmp_path: Path, value: Any) -> None:
    write(tmp_path, {CONFIG: {"eos_token_id": value}})
    with pytest.raises(
        ModelFolderError, match=r"config.json: eos_token_id .* is neither a token id nor .* 16\)"
    ):
        read_token_ids(tmp_path, vocab_size=16)


@pytest.mark.parametrize(
    ("key", "value"), [("bos_token_id", [1]), ("bos_token_id", 16), ("pad_token_id", [0])]
)
def test_other_id_that_is_no_token_id_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, {GENERATION: {"eos_token_id": 2, key: value}})
    with pytest.raises(ModelFolderError, match=rf"generation_config.json: {key} .* is no token id"):
        read_token_ids(tmp_path, vocab_size=16)
