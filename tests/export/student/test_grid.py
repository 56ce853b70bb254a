from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from export.graph.quantize import WeightOnly, quantize_weights
from export.student.grid import BlockGrid, encode, pack
from tests.support.export.grids import round_to_nearest, unpack
from tests.support.graphs import matmul_graph

GRIDS = [BlockGrid(bits, block_size) for bits in (4, 8) for block_size in (16, 32)]


def random_weight(num_outputs: int = 24, num_inputs: int = 64) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_inputs", [64, 72])
def test_rounding_and_packing_are_onnxruntimes_own(grid: BlockGrid, num_inputs: int) -> None:
    weight = random_weight(num_inputs=num_inputs)
    quantized = quantize_weights(matmul_graph(weight), WeightOnly(grid.bits, grid.block_size))
    expected = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    (node,) = quantized.graph.node
    packed, scales = pack(round_to_nearest(weight, grid))
    assert np.array_equal(expected[node.input[2]].ravel(), scales.ravel())
    # A weight half-way between two codes may go either way; there is none in random weights.
    assert np.array_equal(packed.ravel(), expected[node.input[1]].ravel())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_inputs", [64, 72])
def test_rounded_weight_is_the_same_unpacked_and_rounded_again(
    grid: BlockGrid, num_inputs: int
) -> None:
    once = round_to_nearest(random_weight(num_inputs=num_inputs), grid)
    unpacked, twice = (
        unpack(*pack(once), grid, num_inputs),
        round_to_nearest(once.dequantize(), grid),
    )
    assert unpacked.codes.equal(once.codes) and unpacked.scales.equal(once.scales)
    assert twice.codes.equal(once.codes) and twice.dequantize().equal(once.dequantize())


def test_encode_beyond_the_scale_stays_on_the_grid() -> None:
    grid = BlockGrid(4, 16)
    codes = encode(torch.tensor([[100.0] * 8 + [-100.0] * 8]), torch.ones(1, 1), grid)
    assert codes.tolist() == [[7] * 8 + [-8] * 8]


@pytest.mark.parametrize("largest", [0.0, 1e-44])
def test_rounding_next_to_0_gives_0(largest: float) -> None:
    weight = round_to_nearest(torch.full((2, 32), largest), BlockGrid(4, 32))
    assert torch.equal(weight.dequantize(), torch.zeros(2, 32))
