from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bundle.errors import ModelFolderError
from export.run.errors import ExportError
from export.student.pretrained import compression_warning, load_student

NUM_TOKENS = 512  # of the tiny teacher's tokenizer
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def save_student(folder: Path, teacher: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    shutil.copy(teacher / "tokenizer.json", folder)
    return folder


def llama(vocab_size: int = NUM_TOKENS) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZES))


@pytest.mark.parametrize("vocab_size", [NUM_TOKENS, NUM_TOKENS + 64])
def test_student_with_the_teachers_tokenizer_is_loaded_in_float32(
    tmp_path: Path, tiny_teacher: Path, vocab_size: int
) -> None:
    saved = llama(vocab_size).bfloat16()
    student = load_student(save_student(tmp_path, tiny_teacher, saved), tiny_teacher)
    assert student.config.vocab_size == vocab_size
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for name, weight in saved.state_dict().items():
        assert student.state_dict()[name].equal(weight.float()), name


def test_student_of_another_family_is_loaded(tmp_path: Path, tiny_teacher: Path) -> None:
    saved = Qwen2ForCausalLM(Qwen2Config(vocab_size=NUM_TOKENS, tie_word_embeddings=True, **SIZES))
    student = load_student(save_student(tmp_path, tiny_teacher, saved), tiny_teacher)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.config.model_type == "qwen2"


def test_other_tokenizer_is_refused_with_what_differs(tmp_path: Path, tiny_teacher: Path) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ExportError, match=r"another tokenizer than the teacher .*: another merges;"
    ):
        load_student(folder, tiny_teacher)


def test_tokenizer_that_is_spelled_otherwise_is_the_teachers(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    cut = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
    tokenizer["truncation"] = cut
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_student(folder, tiny_teacher).config.vocab_size == NUM_TOKENS


def test_vocabulary_smaller_than_the_tokenizer_is_refused(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama(NUM_TOKENS - 1))
    with pytest.raises(
        ExportError, match=r"vocab_size 511, but the tokenizer has ids up to 511, which"
    ):
        load_student(folder, tiny_teacher)


def test_architecture_that_cannot_be_served_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=NUM_TOKENS, n_embd=32, n_layer=1, n_head=2))
    folder = save_student(tmp_path, tiny_teacher, model)
    with pytest.raises(ModelFolderError, match=r"'gpt2' is not supported; supported are llama"):
        load_student(folder, tiny_teacher)


def test_checkpoint_without_all_weights_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"lacks weights, .*layers\.1\.mlp\.up_proj"):
        load_student(folder, tiny_teacher)


def test_pickles_are_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=r"pickles"):
        load_student(folder, tiny_teacher)


@pytest.mark.parametrize(("ratio", "warns"), [(1.5, False), (10.0, False), (10.1, True)])
def test_compression_above_10_is_warned_about(ratio: float, warns: bool) -> None:
    warning = compression_warning(round(ratio * 1000), 1000)
    assert (warning is not None) == warns
    assert warning is None or "10.1 times fewer" in warning
