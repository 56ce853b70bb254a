from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.graph.quantize import WeightOnly, quantize_weights
from export.student.grid import BlockGrid, encode, pack, round_to_nearest, unpack

GRIDS = [BlockGrid(bits, block_size) for bits in (4, 8) for block_size in (16, 32)]


def random_weight(num_outputs: int = 24, num_inputs: int = 64) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))


def matmul_model(weight: torch.Tensor) -> onnx.ModelProto:
    num_outputs, num_inputs = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", num_inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", num_outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.numpy().T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_inputs", [64, 72])
def test_rounding_and_packing_are_onnxruntimes_own(grid: BlockGrid, num_inputs: int) -> None:
    weight = random_weight(num_inputs=num_inputs)
    quantized = quantize_weights(matmul_model(weight), WeightOnly(grid.bits, grid.block_size))
    expected = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    (node,) = quantized.graph.node
    packed, scales = pack(round_to_nearest(weight, grid))
    assert np.array_equal(expected[node.input[2]].ravel(), scales.ravel())
    mine, theirs = packed.ravel(), expected[node.input[1]].ravel()
    assert mine.shape == theirs.shape
    # A weight half-way between two codes may go either way; there is none in random weights.
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_inputs", [64, 72])
def test_unpacking_gives_codes_and_scales_back(grid: BlockGrid, num_inputs: int) -> None:
    weight = round_to_nearest(random_weight(num_inputs=num_inputs), grid)
    again = unpack(*pack(weight), grid, num_inputs)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_a_rounded_weight_changes_nothing(grid: BlockGrid) -> None:
    once = round_to_nearest(random_weight(), grid)
    twice = round_to_nearest(once.dequantize(), grid)
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.dequantize(), once.dequantize())


def test_codes_stay_on_the_grid_beyond_the_scale() -> None:
    grid = BlockGrid(4, 16)
    codes = encode(torch.tensor([[100.0] * 8 + [-100.0] * 8]), torch.ones(1, 1), grid)
    assert codes.tolist() == [[7] * 8 + [-8] * 8]


def test_largest_weight_is_exact() -> None:
    weight, grid = random_weight(), BlockGrid(4, 32)
    blocks = grid.to_blocks(weight)
    rounded = grid.to_blocks(round_to_nearest(weight, grid).dequantize())
    index = blocks.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(rounded.gather(-1, index), blocks.gather(-1, index))


@pytest.mark.parametrize("largest", [0.0, 1e-44])
def test_scale_next_to_zero_gives_codes_of_zero(largest: float) -> None:
    weight = round_to_nearest(torch.full((2, 32), largest), BlockGrid(4, 32))
    assert torch.equal(weight.dequantize(), torch.zeros(2, 32))
