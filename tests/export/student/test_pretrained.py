from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from export.student.pretrained import load_student

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


def test_student_with_a_tokenizer_spelled_otherwise_is_loaded(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    cut = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
    tokenizer["truncation"] = cut
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_student(folder, tiny_teacher).config.vocab_size == NUM_TOKENS


def other_merges(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def be_gpt2(folder: Path) -> None:
    config = GPT2Config(vocab_size=NUM_TOKENS, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (other_merges, ExportError, r"another tokenizer than the teacher .*: another merges;"),
        (
            lambda folder: llama(NUM_TOKENS - 1).save_pretrained(folder),
            ExportError,
            r"vocab_size 511, but the tokenizer has ids up to 511, which",
        ),
        (be_gpt2, ModelFolderError, r"'gpt2' is not supported; supported are llama"),
        (lose_a_weight, ModelFolderError, r"lacks weights, .*layers\.1\.mlp\.up_proj"),
        (lambda folder: (folder / "pytorch_model.bin").touch(), ModelFolderError, "pickles"),
    ],
)
def test_student_that_cannot_be_loaded_is_refused(
    tmp_path: Path,
    tiny_teacher: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    folder = save_student(tmp_path, tiny_teacher, llama())
    damage(folder)
    with pytest.raises(error, match=message):
        load_student(folder, tiny_teacher)
