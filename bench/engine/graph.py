"""A variant's graph with longer rotary tables, for contexts beyond what it was exported for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bundle.errors import UserError
from bundle.json_files import read_object
from bundle.model_config import read_model_config

# Inputs of com.microsoft::GroupQueryAttention.
COS_CACHE, SIN_CACHE = 7, 8


def lengthen(variant_dir: Path, target_dir: Path, max_model_len: int) -> None:
    """Write the variant to `target_dir`, its tables computed for `max_model_len` positions.

    Raises UserError unless the tables are the plain ones of RoFormer (arXiv 2104.09864, eq. 15):
    angles position · theta^(−2i / head_dim), without scaling.
    """
    config = read_object(variant_dir / "config.json")
    theta = read_model_config(variant_dir).rope.theta
    model = onnx.load(variant_dir / "model.onnx")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    blocks = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    names = {(node.input[COS_CACHE], node.input[SIN_CACHE]) for node in blocks}
    for pair in names:
        for name, function in zip(pair, (np.cos, np.sin), strict=True):
            table = numpy_helper.to_array(initializers[name])
            angles = _angles(max_model_len, 2 * table.shape[1], theta)
            longer = function(angles).astype(table.dtype)
            if not np.allclose(longer[: len(table)], table, atol=1e-3):
                raise UserError(f"{variant_dir}: its rotary tables are scaled; it stays as it is")
            initializers[name].CopyFrom(numpy_helper.from_array(longer, name))
    config["max_position_embeddings"] = max_model_len
    shutil.copytree(variant_dir, target_dir, ignore=shutil.ignore_patterns("model.onnx*"))
    (target_dir / "config.json").write_text(json.dumps(config))
    data = "model.onnx.data"
    onnx.save(model, target_dir / "model.onnx", save_as_external_data=True, location=data)


def _angles(num_positions: int, head_dim: int, theta: float) -> NDArray[np.float32]:
    """Return `(num_positions, head_dim / 2)`, in float32 like transformers."""
    frequencies = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    positions = np.arange(num_positions, dtype=np.float32)
    angles: NDArray[np.float32] = np.outer(positions, frequencies.astype(np.float32))
    return angles
