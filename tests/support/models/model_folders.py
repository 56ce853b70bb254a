"""Folders of tiny models as their makers would save them, for tests that read files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from bundle.model_config import judge_config
from bundle.model_weights import expected_shapes

TINY: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 16,
}
TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'


def tiny_weights(config: Mapping[str, Any] = TINY) -> dict[str, np.ndarray]:
    """Return zeros of the shapes that a configuration asks for."""
    shapes = expected_shapes(judge_config(config))
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_model_folder(folder: Path, config: Mapping[str, Any] = TINY, **files: str) -> Path:
    """Write configuration, weights and tokenizer; `files` are written last, over the others."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    texts = {"config.json": json.dumps(dict(config)), "tokenizer.json": TOKENIZER}
    for name, text in (texts | files).items():
        (folder / name).write_text(text)
    return folder


def shard(folder: Path) -> tuple[Path, Path]:
    """Split the weights of a folder into two files and an index; return the files."""
    single = folder / "model.safetensors"
    weights = load_file(single)
    single.unlink()
    names = sorted(weights)
    paths = tuple(folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    weight_map = {}
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths[0], paths[1]
