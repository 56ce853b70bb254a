from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from export.run.model_specs import TeacherError
from export.teacher.gguf import build_tokenizer, convert_gguf, read_metadata, special_token_ids
from export.teacher.source import find_teacher, resolve_teacher
from tests.support.models.tiny_gguf import make_metadata, write_tiny_gguf


def test_gguf_becomes_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    messages: list[str] = []
    assert find_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
    teacher = resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache", messages.append)
    assert teacher.path.name.isidentifier(), "transformers warns about other folder names"

    assert sorted(path.name for path in teacher.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(teacher.path)
    weights = model.state_dict()
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd"])
    np.testing.assert_array_equal(
        weights["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down"]
    )
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.config.pad_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    assert type(tokenizer).__name__ == "PreTrainedTokenizerFast"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi<|im_end|>"
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
    ids = tokenizer(text).input_ids
    assert [tokenizer.decode(i) for i in ids] == ["<|im_start|>", "Hi", "<|im_end|>"]

    assert teacher.reference.source.endswith("tiny.gguf")
    assert teacher.reference.architecture == "LlamaForCausalLM"
    assert teacher.reference.num_parameters == sum(tensor.size for tensor in tensors.values())
    assert messages == ["converting tiny.gguf to safetensors"]
    again = resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache", messages.append)
    assert again == teacher == find_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert len(messages) == 1, "a converted teacher is not converted again"


def test_gguf_without_all_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tensor = GGUFWriter.add_tensor

    def skip_one(self: GGUFWriter, name: str, tensor: Any) -> None:
        if name != "blk.0.ffn_up.weight":
            add_tensor(self, name, tensor)

    monkeypatch.setattr(GGUFWriter, "add_tensor", skip_one)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(TeacherError, match=r"lacks weights.*up_proj"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", lambda message: None)


def test_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture="jais")
    with pytest.raises(TeacherError, match=r"cannot be converted: .*jais"):
        resolve_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "Hi +12\n\n1.", ["Hi", "Ġ+", "1", "2", "ĊĊ", "1", "."]),  # digits first
        ("gpt-2", "\n\n1.", ["Ċ", "Ċ", "1", "."]),
    ],
)
def test_gguf_tokenizer_splits_as_the_file_says(pre: str, text: str, tokens: list[str]) -> None:
    assert build_tokenizer(make_metadata(pre=pre)).encode(text).tokens == tokens


@pytest.mark.parametrize("text", ["a  b", "naïve 東京 👍", "▁x", " leading", "<user>Hi"])
def test_gguf_tokenizer_gives_the_text_back(text: str) -> None:
    tokenizer = build_tokenizer(make_metadata())
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_gguf_tokenizer_has_control_tokens_alone_as_special() -> None:
    tokenizer = build_tokenizer(make_metadata())
    ids = tokenizer.encode("<|im_start|><user><|im_end|>").ids
    assert ids[0] == 1
    assert ids[2] == 2
    assert tokenizer.decode(ids) == "<user>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama', BOS added: False. is not a byte-level BPE"),
        ({"add_bos_token": True}, "'gpt2', BOS added: True"),
        ({"pre": "jais"}, "'jais' is none of gpt-2, smollm"),
    ],
)
def test_gguf_tokenizer_that_cannot_be_rebuilt_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        build_tokenizer(make_metadata(**changes))


def test_gguf_special_token_ids_come_from_the_model() -> None:
    metadata = make_metadata(unknown_token_id=0, padding_token_id=7)
    assert special_token_ids(metadata) == {"bos": 1, "eos": 2, "unk": 0, "pad": 7}
    with pytest.raises(TeacherError, match="names no EOS token"):
        special_token_ids({})


def test_gguf_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model, but long enough to hold a header" * 10)
    with pytest.raises(TeacherError, match=r"x.gguf cannot be read as GGUF"):
        read_metadata(tmp_path / "x.gguf")
