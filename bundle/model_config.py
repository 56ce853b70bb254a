"""A model's `config.json`, judged from its raw JSON before any class of a model library sees it.

A model class of transformers takes every key that it is given as an attribute: a key may name code
in the folder, other weights, or an attention kernel that is fetched and called (CVE-2026-4372,
CVE-2026-5241). So only the keys of `bundle.config_keys` are handed on, each checked. Of the others,
those that lead out of the folder refuse it, wherever they are nested; the rest is not read, which
`ModelConfig.ignored_keys` tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.config_keys import (
    BOOKKEEPING,
    BY_TYPE,
    COMMON,
    DEFAULT_HEAD_DIM,
    DEFAULT_THETA,
    DEFAULT_TIED,
    NEUTRAL,
    QUANTIZED,
    REQUIRED,
    SUPPORTED_MODEL_TYPES,
)
from bundle.errors import ModelFolderError, one_line
from bundle.json_files import read_object, walk
from bundle.rope import Rope, read_rope

CONFIG_NAME = "config.json"

# Keys of a configuration with which transformers and PEFT leave the folder.
LEADS_OUT = {
    "auto_map": "runs code from the model's folder",
    "custom_generate": "runs code from the model's folder",
    "custom_pipelines": "runs code from the model's folder",
    "trust_remote_code": "runs code from the model's folder",
    "transformers_weights": "names other weights than the folder's",
    "base_model_name_or_path": "names another model",
    "use_kernels": "fetches kernels and calls them",
    "kernel_config": "fetches kernels and calls them",
    "hub_kernels": "fetches kernels and calls them",
}
# Implementations that a library has itself, where a key may also name a repository of a hub.
_OWN_IMPLEMENTATIONS = (
    None, True, False, "", "eager", "sdpa", "flex_attention", "flash_attention_2",
    "flash_attention_3", "grouped_mm", "batched_mm",
)  # fmt: skip
_IMPLEMENTATION = re.compile(r"_implementation", re.IGNORECASE)
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a configuration says.

    `settings` holds the listed keys alone, spelled as transformers 4.57 does, defaults of its
    classes left out; token ids are not among them (`bundle.token_ids`).
    """

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope
    dtype: str | None
    settings: Mapping[str, Any]
    ignored_keys: tuple[str, ...]


def read_model_config(folder: Path) -> ModelConfig:
    """Read and judge `config.json`; ModelFolderError names file, key and what is allowed."""
    path = folder / CONFIG_NAME
    raw = read_object(path)
    check_stays(raw, path)
    try:
        return judge_config(raw)
    except ValueError as error:
        raise ModelFolderError(one_line(f"{path}: {error}")) from None


def check_stays(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse a configuration with a key, at any depth, that leads out of its folder."""
    for _, part in walk(raw):
        for key, value in part.items() if isinstance(part, dict) else ():
            if key.lower() in LEADS_OUT and value is not None and value is not False:
                raise ModelFolderError(
                    one_line(f"{path} has {key!r}, which {LEADS_OUT[key.lower()]}")
                )
            if _IMPLEMENTATION.search(key) and not _is_own(value):
                raise ModelFolderError(
                    one_line(f"{path} has {key!r}: {value!r}, which names code elsewhere")
                )


def _is_own(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else [value]
    return all(not isinstance(v, dict | list) and v in _OWN_IMPLEMENTATIONS for v in values)


def judge_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return what a raw configuration says; ValueError with everything that is wrong in it."""
    model_type = _supported_type(raw)
    settings = _checked_settings(raw, model_type)
    rope = read_rope(raw, DEFAULT_THETA.get(model_type, 10_000.0))
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    read = settings.keys() | COMMON.keys() | BY_TYPE[model_type].keys() | NEUTRAL.keys()
    config = ModelConfig(
        model_type=model_type,
        architecture=_architecture(raw, model_type),
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        intermediate_size=settings["intermediate_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=settings.get("num_key_value_heads", heads),
        head_dim=settings.get("head_dim", DEFAULT_HEAD_DIM.get(model_type, hidden // heads)),
        max_position_embeddings=settings["max_position_embeddings"],
        tie_word_embeddings=settings.get(
            "tie_word_embeddings", DEFAULT_TIED.get(model_type, False)
        ),
        rope=rope,
        dtype=_dtype(raw),
        settings={**settings, "rope_theta": rope.theta, "rope_scaling": _copied(rope.scaling)},
        ignored_keys=tuple(sorted(raw.keys() - read - BOOKKEEPING)),
    )
    _check_shapes(config)
    _check_layers(config)
    return config


def _checked_settings(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the listed keys that a file has; ValueError names all that are missing or wrong."""
    rules = {**COMMON, **BY_TYPE[model_type]}
    # The other classes have numbers of their own for it.
    required = [*REQUIRED, *([] if model_type == "llama" else ["num_key_value_heads"])]
    problems = [f"{key} is missing" for key in required if raw.get(key) is None]
    problems += [
        f"{key} is {_short(raw[key])}, allowed is {allowed}"
        for key, (is_right, allowed) in {**rules, **NEUTRAL}.items()
        if key in raw and not (key in required and raw[key] is None) and not is_right(raw[key])
    ]
    if problems:
        raise ValueError("; ".join(problems))
    settings = {key: raw[key] for key in rules if raw.get(key) is not None}
    if "sliding_window" in raw.keys() & rules.keys():  # null is another value than the default
        settings["sliding_window"] = raw["sliding_window"]
    return settings


def _supported_type(raw: Mapping[str, Any]) -> str:
    """Return the model type; ValueError where it is not supported, or the weights are quantized."""
    model_type = raw.get("model_type")
    supported = f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
    if model_type is None:
        raise ValueError(f"model_type is missing; {supported}")
    if not isinstance(model_type, str) or model_type not in SUPPORTED_MODEL_TYPES:
        wrapped = " (a model of several parts)" if "text_config" in raw else ""
        raise ValueError(f"model type {_short(model_type)}{wrapped} is not supported; {supported}")
    for key in QUANTIZED:
        if raw.get(key) is not None:
            raise ValueError(
                f"{key} says that the weights are quantized: give the model in float16, bfloat16 "
                "or float32 instead"
            )
    return model_type


def _architecture(raw: Mapping[str, Any], model_type: str) -> str:
    """Return the class that the file names, which must be the language model of its type."""
    names = raw.get("architectures")
    if names is None or names == []:
        return model_type
    expected = f"{model_type}ForCausalLM".lower()
    if isinstance(names, list):
        for name in names:
            if isinstance(name, str) and name.lower() == expected:
                return name
    raise ValueError(
        f"architectures is {_short(names)}; supported is the language model of {model_type!r} alone"
    )


def _dtype(raw: Mapping[str, Any]) -> str | None:
    """Return the type of the weights when they were saved, as torch calls it."""
    found = set()
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key)
        if value in (None, "auto"):
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in _DTYPES:
            raise ValueError(f"{key} is {_short(value)}, allowed are {', '.join(_DTYPES)}")
        found.add(name)
    if len(found) > 1:
        raise ValueError(f"dtype is {raw['dtype']!r}, torch_dtype is {raw['torch_dtype']!r}")
    return found.pop() if found else None


def _check_shapes(config: ModelConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if "head_dim" not in config.settings and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads}"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}, rotary embeddings want an even one")


def _check_layers(config: ModelConfig) -> None:
    """Refuse lists of another length than the model, and windows that transformers reads over."""
    for key in ("layer_types", "no_rope_layers"):
        listed = config.settings.get(key)
        if listed is not None and len(listed) != config.num_hidden_layers:
            raise ValueError(
                f"{key} lists {len(listed)} layers, num_hidden_layers is {config.num_hidden_layers}"
            )
    if config.model_type == "mistral" and "layer_types" in config.settings:
        has_window = config.settings.get("sliding_window", 4096) is not None
        expected = "sliding_attention" if has_window else "full_attention"
        if any(name != expected for name in config.settings["layer_types"]):
            raise ValueError(
                "layer_types differ from sliding_window, which 'mistral' has for all layers or none"
            )


def _copied(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if scaling is None else dict(scaling)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
