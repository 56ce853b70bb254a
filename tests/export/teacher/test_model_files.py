from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle.token_ids import TokenIds
from export.run.errors import ExportError
from export.run.files import read_json, write_json
from export.teacher.model_files import copy_tokenizer, genai_config, load_model, write_variant_files

LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 26,
    "max_position_embeddings": 2048,
    "head_dim": 64,
}
IDS = TokenIds((2,), 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_gives_the_dtype_asked_for_and_no_dropout(
    tiny_teacher: Path, dtype: torch.dtype
) -> None:
    model = load_model(tiny_teacher, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


# --- the tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_chat_template_is_found_in_either_place(
    tiny_teacher: Path, folders: tuple[Path, Path]
) -> None:
    """Older folders, those of most Hugging Face ids, keep it in tokenizer_config.json."""
    source, target = folders
    for name in ("tokenizer.json", "generation_config.json"):
        (source / name).write_bytes((tiny_teacher / name).read_bytes())
    template = (tiny_teacher / "chat_template.jinja").read_text()
    config = read_json(tiny_teacher / "tokenizer_config.json")
    write_json(source / "tokenizer_config.json", config | {"chat_template": template})
    copy_tokenizer(source, target)
    assert (target / "chat_template.jinja").read_text() == template


def test_default_of_named_templates_is_the_students(
    tiny_teacher: Path, folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "tokenizer.json").write_bytes((tiny_teacher / "tokenizer.json").read_bytes())
    named = [{"name": n, "template": n.upper()} for n in ("tool_use", "default")]
    write_json(source / "tokenizer_config.json", {"chat_template": named})
    copy_tokenizer(source, target)
    assert (target / "chat_template.jinja").read_text() == "DEFAULT"


@pytest.mark.parametrize("templates", [None, [{"name": "rag", "template": ""}]])
def test_teacher_without_a_default_template_is_refused(
    tiny_teacher: Path, folders: tuple[Path, Path], templates: Any
) -> None:
    source, target = folders
    (source / "tokenizer.json").write_bytes((tiny_teacher / "tokenizer.json").read_bytes())
    write_json(source / "tokenizer_config.json", {"chat_template": templates})
    with pytest.raises(ExportError, match="has no chat template, or none of the name default"):
        copy_tokenizer(source, target)


@pytest.mark.parametrize("config", [None, {"bos_token": "<|im_start|>"}])
def test_student_of_another_family_keeps_the_class_of_the_teachers_tokenizer(
    tiny_teacher: Path, folders: tuple[Path, Path], config: Any
) -> None:
    """Where tokenizer_config.json names no class or is missing, config.json's family says it."""
    source, target = folders
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        (source / name).write_bytes((tiny_teacher / name).read_bytes())
    if config is not None:
        write_json(source / "tokenizer_config.json", config)
    copy_tokenizer(source, target)
    copied = read_json(target / "tokenizer_config.json")
    assert copied == (config or {}) | {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize("is_there", [True, False])
def test_teacher_may_lack_a_generation_config(
    tiny_teacher: Path, folders: tuple[Path, Path], is_there: bool
) -> None:
    """Where it does, the one that transformers saved with the student stays."""
    source, target = folders
    for path in tiny_teacher.iterdir():
        if is_there or path.name != "generation_config.json":
            (source / path.name).write_bytes(path.read_bytes())
    (target / "generation_config.json").write_text('{"eos_token_id": 99}')
    copy_tokenizer(source, target)
    eos = read_json(target / "generation_config.json")["eos_token_id"]
    assert eos == (2 if is_there else 99)


def test_tokenizer_files_of_the_student_are_those_of_the_teacher(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    copy_tokenizer(tiny_teacher, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tiny_teacher / path.name).read_bytes()


# --- genai_config.json


def test_genai_config_describes_the_graph() -> None:
    model = genai_config(LLAMA, IDS)["model"]
    assert model["type"] == "llama"
    assert genai_config(LLAMA | {"model_type": "qwen3"}, IDS)["model"]["type"] == "qwen3"
    assert {key: model[key] for key in ("vocab_size", "context_length")} == {
        "vocab_size": 49152,
        "context_length": 2048,
    }
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 2)
    decoder = model["decoder"]
    assert decoder["filename"] == "model.onnx"
    sizes = ("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads")
    assert [decoder[key] for key in (*sizes, "num_hidden_layers")] == [576, 64, 9, 3, 26]


def test_genai_config_names_the_inputs_of_the_graph(exported_llama: Any) -> None:
    import onnx

    folder = exported_llama.variants["fp32"]
    decoder = read_json(folder / "genai_config.json")["model"]["decoder"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    names = {value.name for value in (*graph.input, *graph.output)} - {"logit_rows"}
    described = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    layers = range(decoder["num_hidden_layers"])
    assert {n % i if "%d" in n else n for n in described for i in layers} == names


@pytest.mark.parametrize(("head_dim", "expected"), [(None, 64), (128, 128)])
def test_genai_config_derives_a_head_size_that_is_missing(
    head_dim: int | None, expected: int
) -> None:
    config = LLAMA | {"head_dim": head_dim}
    assert genai_config(config, IDS)["model"]["decoder"]["head_size"] == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (
            TokenIds((128001, 128008, 128009), 128000, None),
            (128000, [128001, 128008, 128009], 128001),
        ),
        (TokenIds((2,), None, 0), (None, 2, 0)),
        (TokenIds((2, 5), 1, 7), (1, [2, 5], 7)),
    ],
)
def test_genai_config_has_every_eos_and_one_pad(ids: TokenIds, expected: tuple[Any, ...]) -> None:
    """As Llama-3.2 has them: several EOS ids and no pad, for which genai takes no list."""
    model = genai_config(LLAMA, ids)["model"]
    assert (model.get("bos_token_id"), model["eos_token_id"], model["pad_token_id"]) == expected
    assert None not in model.values()


# --- what lies beside a graph


def test_variant_folder_has_config_and_tokenizer(exported_llama: Any, tmp_path: Path) -> None:
    write_variant_files(exported_llama.student_dir, tmp_path, 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_variant_config_states_the_positions_of_the_graph(
    exported_llama: Any, tmp_path: Path
) -> None:
    write_variant_files(exported_llama.student_dir, tmp_path, 123)
    assert read_json(tmp_path / "config.json")["max_position_embeddings"] == 123
    genai = read_json(tmp_path / "genai_config.json")
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 123


def test_write_json_is_for_people_and_read_back(tmp_path: Path) -> None:
    value = {"prompt": "¿Qué?", "kl": [0.1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert text.endswith("\n") and len(text.splitlines()) > 1
    assert json.loads(text) == value
