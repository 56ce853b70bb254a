"""The keys of `config.json` that a model class may see, and which values each may have.

They are those that the five architectures of transformers 4.57 read, as published configurations
have them. What is not here is not handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bundle.rope import LAYER_TYPES

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
QUANTIZED = ("quantization_config", "quantization", "compression_config")

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and the words for those that are."""


# Most that a real model has of anything, with room: a count in a file is not what memory is for.
_MAX_SIZE, _MAX_LAYERS = 1 << 24, 1 << 12


def _integer(low: int, high: int) -> Rule:
    return lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}"


def _number(low: float, high: float) -> Rule:
    return lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low} to {high}"


def _or_null(rule: Rule) -> Rule:
    return lambda v: v is None or rule[0](v), f"{rule[1]}, or null"


_SIZE = _integer(1, _MAX_SIZE)
_FLAG: Rule = (lambda v: isinstance(v, bool), "true or false")
_LAYER_NAMES: Rule = (
    lambda v: isinstance(v, list) and v != [] and all(name in LAYER_TYPES for name in v),
    f"a list of {' and '.join(LAYER_TYPES)}",
)
_SWITCHES: Rule = (
    lambda v: isinstance(v, list) and all(type(i) is int and i in (0, 1) for i in v),
    "a list of 0 and 1",
)

REQUIRED: Mapping[str, Rule] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _integer(1, _MAX_LAYERS),
    "num_attention_heads": _SIZE,
    "max_position_embeddings": _integer(1, (1 << 31) - 1),
    "rms_norm_eps": _number(0, 1),
}
COMMON: Mapping[str, Rule] = {
    **REQUIRED,
    "num_key_value_heads": _or_null(_SIZE),
    "head_dim": _or_null(_SIZE),
    "hidden_act": (lambda v: v == "silu", "'silu', all that the decoder computes"),
    "initializer_range": _number(0, 1e6),
    "attention_dropout": _or_null(_number(0, 1)),
    "tie_word_embeddings": _FLAG,
    "use_cache": _FLAG,
}
# Not handed on, as any other value is refused.
NEUTRAL: Mapping[str, Rule] = {
    "partial_rotary_factor": (lambda v: v in (None, 1), "1.0, all that the decoder computes"),
    "attn_logit_softcapping": (lambda v: v is None, "null, all that the decoder computes"),
    "final_logit_softcapping": (lambda v: v is None, "null, all that the decoder computes"),
}
_WINDOWS: Mapping[str, Rule] = {
    "use_sliding_window": _FLAG,
    "sliding_window": _or_null(_integer(1, (1 << 31) - 1)),
    "max_window_layers": _or_null(_integer(0, (1 << 31) - 1)),
    "layer_types": _or_null(_LAYER_NAMES),
}
BY_TYPE: Mapping[str, Mapping[str, Rule]] = {
    "llama": {
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
        "pretraining_tp": _or_null(_integer(1, 1 << 10)),
    },
    "mistral": {
        "sliding_window": _WINDOWS["sliding_window"],
        "layer_types": _WINDOWS["layer_types"],
    },
    "qwen2": _WINDOWS,
    "qwen3": {**_WINDOWS, "attention_bias": _FLAG},
    "smollm3": {
        **_WINDOWS,
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
        "no_rope_layers": _or_null(_SWITCHES),
        "no_rope_layer_interval": _integer(1, _MAX_LAYERS),
    },
}
# What the classes of transformers 4.57 and 5 take where a file says nothing.
DEFAULT_THETA = {"smollm3": 2_000_000.0}
DEFAULT_HEAD_DIM = {"qwen3": 128}
DEFAULT_TIED = {"smollm3": True}
# Not read here, and known not to matter: who saved the file, and what other libraries keep in it.
BOOKKEEPING = frozenset({
    "architectures", "model_type", "transformers_version", "_name_or_path", "_commit_hash",
    "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "is_llama_config",
    "rope_interleaved", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", *QUANTIZED,
})  # fmt: skip
