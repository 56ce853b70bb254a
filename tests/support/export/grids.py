"""Weights on a grid: by plain rounding, and as a graph holds them."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from export.student.grid import BlockGrid, GridWeight, absmax_scales, encode


def round_to_nearest(weight: torch.Tensor, grid: BlockGrid) -> GridWeight:
    """Quantize `(N, K)` as onnxruntime does: `absmax_scales`, every weight rounded by itself."""
    weight = weight.float()
    scales = absmax_scales(weight, grid)
    return GridWeight(grid, encode(weight, scales, grid), scales)


def unpack(packed: np.ndarray, scales: np.ndarray, grid: BlockGrid, num_inputs: int) -> GridWeight:
    """Return the weight that `pack` packed."""
    unsigned = torch.from_numpy(np.array(packed))
    if grid.bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], -1).flatten(-2)
    codes = (unsigned.to(torch.int16) + grid.min_code).to(torch.int8)
    num_outputs = len(codes)
    return GridWeight(
        grid,
        codes.reshape(num_outputs, -1)[:, :num_inputs].contiguous(),
        torch.from_numpy(np.array(scales)).view(num_outputs, -1),
    )


def read_grid_weights(model: onnx.ModelProto) -> dict[str, GridWeight]:
    """Return the weight of every `MatMulNBits`, by the name of its node in the float graph."""
    initializers = {i.name: i for i in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {a.name: a.i for a in node.attribute}
        grid = BlockGrid(attributes["bits"], attributes["block_size"])
        packed, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
        name = node.name.removesuffix(f"_Q{grid.bits}")
        weights[name] = unpack(packed, scales, grid, attributes["K"])
    return weights
