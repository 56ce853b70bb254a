"""The torch runtime: transformers' logits for every kind of weight, and the same bits on any path.

test_backends.py has what both runtimes share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from serve.models.cuda_graphs import DecodeGraphs
from serve.models.torch_backend import TorchBackend

VOCAB_SIZE = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "wide-heads": lambda: LlamaConfig(**SIZES, head_dim=32),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "one-kv-head": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "no-groups": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "one-head": lambda: LlamaConfig(
        **{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}
    ),
    "linear": lambda: LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3": lambda: LlamaConfig(**SIZES, rope_scaling=LLAMA3),
    "yarn": lambda: LlamaConfig(**SIZES, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2-windows": lambda: Qwen2Config(**SIZES, **WINDOWS),
    "smollm3": lambda: SmolLM3Config(**SIZES, **WINDOWS, no_rope_layers=[1, 0], pad_token_id=0),
}
Rows = list[list[int]]


def random_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def take(model: Any, max_num_seqs: int = 4, max_model_len: int = 600) -> TorchBackend:
    limits = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    return TorchBackend.take(copy.deepcopy(model), device="cpu", **limits)


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


def logits_in_one_pass(backend: TorchBackend, ids: list[int], row: int = 0) -> torch.Tensor:
    return backend.forward(row, [ids], [0], [range(len(ids))]).clone()


@torch.no_grad()
def transformers_logits(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


@pytest.fixture(scope="module")
def bf16() -> TorchBackend:
    return take(random_model(LlamaConfig(**SIZES), torch.bfloat16))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_kind_of_weight_gives_the_logits_of_transformers(name: str) -> None:
    model, ids = random_model(CONFIGS[name]()), text(200)
    backend, expected = take(model), transformers_logits(model, ids)
    tolerance = {"rtol": 0, "atol": 5e-4}
    torch.testing.assert_close(logits_in_one_pass(backend, ids), expected, **tolerance)
    decoded = torch.cat([backend.forward(0, [[ids[i]]], [i]).clone() for i in range(190, 200)])
    torch.testing.assert_close(decoded, expected[190:], **tolerance)
    backend.forward(1, [ids[:90]], [0])
    chunk = backend.forward(1, [ids[90:]], [90], [range(110)])
    torch.testing.assert_close(chunk, expected[90:], **tolerance)


def test_bfloat16_is_as_near_to_float32_as_in_transformers() -> None:
    exact, rounded = (random_model(LlamaConfig(**SIZES)) for _ in range(2))
    rounded.to(torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    rounded.model.rotary_emb = copy.deepcopy(exact.model.rotary_emb)  # not in bfloat16
    ids = text(300)
    expected = transformers_logits(exact, ids)
    ours = (logits_in_one_pass(take(rounded), ids) - expected).square().mean()
    theirs = (transformers_logits(rounded, ids).float() - expected).square().mean()
    assert 0 < ours <= 1.05 * theirs


@pytest.mark.parametrize("past", [0, 190, 250, 380, 500])
def test_one_token_at_a_time_has_the_bits_of_one_pass(bf16: TorchBackend, past: int) -> None:
    ids = text(past + 8)
    expected = logits_in_one_pass(bf16, ids)
    if past:
        bf16.forward(1, [ids[:past]], [0])
    for position in range(past, past + 8):
        logits = bf16.forward(1, [[ids[position]]], [position])
        assert torch.equal(logits[0], expected[position])


@pytest.mark.parametrize(("size", "total"), [(2, 20), (3, 20), (33, 400), (128, 550), (250, 550)])
def test_chunks_have_the_bits_of_one_pass(bf16: TorchBackend, size: int, total: int) -> None:
    ids = text(total)
    expected = logits_in_one_pass(bf16, ids)
    for start in range(0, total, size):
        chunk = ids[start : start + size]
        logits = bf16.forward(1, [chunk], [start], [range(len(chunk))])
        assert torch.equal(logits, expected[start : start + size])


@pytest.mark.parametrize("lengths", [[9], [200, 3], [9, 370, 30, 1], [500, 250, 100, 2]])
def test_decoding_has_the_same_bits_in_every_batch(bf16: TorchBackend, lengths: list[int]) -> None:
    rows: Rows = [text(length + 1, length) for length in lengths]
    expected = torch.stack([logits_in_one_pass(bf16, row)[-1] for row in rows])
    bf16.forward(0, [row[:-1] for row in rows], [0] * len(rows))
    logits = bf16.forward(0, [row[-1:] for row in rows], lengths)
    assert torch.equal(logits, expected)


def test_scoring_ragged_rows_has_the_bits_of_each_alone(bf16: TorchBackend) -> None:
    rows, pasts = [text(40, 1), text(280, 2), text(400, 3)], [8, 260, 369]
    expected = [logits_in_one_pass(bf16, row)[n:] for row, n in zip(rows, pasts, strict=True)]
    for index, (row, past) in enumerate(zip(rows, pasts, strict=True)):
        bf16.forward(index, [row[:past]], [0])
    new = [row[past:] for row, past in zip(rows, pasts, strict=True)]
    logits = bf16.forward(0, new, pasts, [range(len(ids)) for ids in new])
    assert torch.equal(logits, torch.cat(expected))


@pytest.mark.parametrize("new", [[[1], [2]], [[1, 2, 3, 4, 5], [6]]], ids=["decode", "chunk"])
def test_rows_behind_the_batch_stay_untouched(bf16: TorchBackend, new: Rows) -> None:
    others = range(2, bf16.info.rows.num_rows)
    before = [bf16.read_kv(row, 0, 600) for row in others]
    bf16.forward(0, new, [20, 30])
    after = [bf16.read_kv(row, 0, 600) for row in others]
    assert all(map(torch.equal, before, after))


def test_kv_put_into_another_row_goes_on_from_there(bf16: TorchBackend) -> None:
    ids = text(60)
    expected = logits_in_one_pass(bf16, ids)[-1]
    first, second = bf16.read_kv(0, 0, 30), bf16.read_kv(0, 30, 59)
    bf16.write_kv(3, 0, first)
    bf16.write_kv(3, 30, second)
    assert torch.equal(bf16.forward(3, [ids[-1:]], [59])[0], expected)


def test_padded_static_steps_are_those_of_the_ordinary_path() -> None:
    backend = take(random_model(LlamaConfig(**SIZES)))
    graphs = DecodeGraphs(backend.decode, lambda step: step, backend.info, max_num_keys=608)
    prompts, pasts = [text(n, n) for n in (5, 300, 17)], [5, 300, 17]
    backend.forward(0, prompts, [0] * 3)
    with torch.inference_mode():
        static = graphs.decode([1, 2, 3], pasts).clone()
    backend.forward(0, prompts, [0] * 3)
    ordinary = backend.forward(0, [[1], [2], [3]], pasts)
    torch.testing.assert_close(static, ordinary, rtol=0, atol=1e-3)


def test_cast_model_keeps_exact_rotary_frequencies(tmp_path: Any) -> None:
    model, ids = random_model(LlamaConfig(**SIZES)), text(500)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    limits = {"device": "cpu", "max_num_seqs": 1, "max_model_len": 600}
    loaded = TorchBackend.load(tmp_path, dtype=torch.bfloat16, **limits)
    assert torch.equal(logits_in_one_pass(take(model), ids), logits_in_one_pass(loaded, ids))


def test_taken_model_is_left_without_its_layers() -> None:
    model = random_model(LlamaConfig(**SIZES))
    TorchBackend.take(model, device="cpu", max_num_seqs=1, max_model_len=8)
    assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}


def test_info_counts_the_parameters_of_the_whole_model() -> None:
    model = random_model(LlamaConfig(**SIZES))
    assert take(model).info.num_parameters == model.num_parameters() > 0


def test_unsupported_model_is_not_taken() -> None:
    model = random_model(LlamaConfig(**SIZES, hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        take(model)
