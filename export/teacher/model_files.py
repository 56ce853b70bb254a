"""The files of a model's folder: weights, configuration, tokenizer, and for other runtimes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bundle.token_ids import TokenIds, one_or_list, read_token_ids
from export.run.errors import ExportError
from export.run.files import read_json, write_json
from serve.text.tokenizer_files import (
    CONFIG_NAME,
    DEFAULT_TEMPLATE,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    read_templates,
    tokenizer_class,
)

TOKENIZER_FILES = (TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME)
OLDER_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Read where tokenizer_config.json lists no added tokens."""


def training_device() -> torch.device:
    """Return where models are trained: this process's GPU, the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_model(path: Path, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Return the model of a folder; on the CPU by default. See `serve.models.pretrained`."""
    from serve.models.pretrained import load_pretrained

    return load_pretrained(path, dtype).to(device or "cpu")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model's tokenizer and generation config to where its student was saved.

    The student gets its chat template as a file, and the class of its tokenizer by name, where the
    source has these elsewhere. ExportError when the source has no chat template.
    """
    config = read_json(source / CONFIG_NAME) if (source / CONFIG_NAME).exists() else {}
    older = () if "added_tokens_decoder" in config else OLDER_TOKENIZER_FILES
    for name in (*TOKENIZER_FILES, *older, "generation_config.json"):
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
    templates = read_templates(source)
    if DEFAULT_TEMPLATE not in templates:
        raise ExportError(f"{source} has no chat template, or none of the name default")
    if not (target / TEMPLATE_NAME).exists():
        (target / TEMPLATE_NAME).write_text(templates[DEFAULT_TEMPLATE], encoding="utf-8")
    if config.get("tokenizer_class") is None:
        write_json(target / CONFIG_NAME, config | {"tokenizer_class": tokenizer_class(source)})


def write_variant_files(student_dir: Path, variant_dir: Path, max_model_len: int) -> None:
    """Put beside a graph what other runtimes want there: configuration and tokenizer."""
    config = json.loads((student_dir / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max_model_len
    write_json(variant_dir / "config.json", config)
    write_json(variant_dir / "genai_config.json", genai_config(config, read_token_ids(student_dir)))
    shutil.copy(student_dir / "generation_config.json", variant_dir)
    older = [name for name in OLDER_TOKENIZER_FILES if (student_dir / name).exists()]
    for name in (*TOKENIZER_FILES, *older):
        shutil.copy(student_dir / name, variant_dir)


def genai_config(config: Mapping[str, Any], ids: TokenIds) -> dict[str, Any]:
    """Return onnxruntime-genai's description of a graph, from a transformers configuration.

    It takes one EOS id or a list of them, one pad id alone, and no BOS that is null.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "model": {
            # It names its architectures as transformers does.
            "type": config.get("model_type", "llama"),
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            **({} if ids.bos is None else {"bos_token_id": ids.bos}),
            "eos_token_id": one_or_list(ids.eos),
            "pad_token_id": ids.eos[0] if ids.pad is None else ids.pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": config["hidden_size"],
                "head_size": head_dim,
                "num_attention_heads": config["num_attention_heads"],
                "num_key_value_heads": config["num_key_value_heads"],
                "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": config["max_position_embeddings"],
            "past_present_share_buffer": True,
        },
    }
