from __future__ import annotations

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime import InferenceSession

from export.graph.grid_graph import (
    matmul_weight,
    matmuls_by_input,
    replace_matmul,
    replace_matmuls,
)
from export.graph.quantize import float_matmuls
from export.student.grid import BlockGrid, GridWeight
from tests.support.export.grids import read_grid_weights, round_to_nearest
from tests.support.graphs import matmul_graph


def product(num_inputs: int, num_outputs: int) -> onnx.ModelProto:
    """A graph of a single MatMul with a random weight."""
    return matmul_graph(torch.randn(num_outputs, num_inputs, generator=torch.Generator()))


def two_products() -> onnx.ModelProto:
    """A graph of two MatMul that read the same."""
    model = product(32, 8)
    other = numpy_helper.to_array(model.graph.initializer[0]) + 1
    model.graph.initializer.append(numpy_helper.from_array(other, "v"))
    model.graph.node[0].name = "first"
    model.graph.node.append(helper.make_node("MatMul", ["x", "v"], ["z"], "second"))
    return model


def rounded_weight(model: onnx.ModelProto, index: int = 0) -> GridWeight:
    """The weight of a node rounded to 8 bits."""
    values = numpy_helper.to_array(matmul_weight(model.graph, model.graph.node[index]))
    return round_to_nearest(torch.from_numpy(values.T.copy()), BlockGrid(8, 32))


# Codes no rounding would choose; 72 inputs end in the middle of a block of 16 or 32.
@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (4, 32), (8, 16), (8, 32)])
def test_replaced_matmul_computes_with_the_given_codes_and_scales(
    bits: int, block_size: int
) -> None:
    generator, grid = torch.Generator().manual_seed(0), BlockGrid(bits, block_size)
    model = product(72, 10)
    codes = torch.randint(grid.min_code, grid.max_code + 1, (10, 72), generator=generator)
    scales = torch.randn(10, grid.num_blocks(72), generator=generator)
    weight = GridWeight(grid, codes.to(torch.int8), scales)
    replace_matmul(model, model.graph.node[0], weight, accuracy_level=0)
    assert [i.name for i in model.graph.initializer] == [f"w_Q{bits}", "w_scales"]

    read = read_grid_weights(model)["product"]
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.scales, weight.scales)
    inputs = torch.randn(5, 72, generator=generator)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": inputs.numpy()})
    expected = inputs @ weight.dequantize().T
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5 * 2**bits)


def test_weight_that_another_node_reads_is_kept() -> None:
    model = product(32, 32)
    model.graph.node.append(helper.make_node("MatMul", ["y", "w"], ["z"], "other"))
    replace_matmul(model, model.graph.node[0], rounded_weight(model), accuracy_level=4)
    assert "w" in {i.name for i in model.graph.initializer}
    assert float_matmuls(model) == ["other"]


def test_only_nodes_with_a_weight_are_replaced() -> None:
    model = two_products()
    replace_matmuls(model, {"second": rounded_weight(model, 1)}, accuracy_level=2)
    first, second = model.graph.node
    assert (first.op_type, second.op_type) == ("MatMul", "MatMulNBits")
    assert {a.name: a.i for a in second.attribute}["accuracy_level"] == 2


def test_matrix_products_are_found_by_what_they_read() -> None:
    graph = two_products().graph
    assert matmuls_by_input(graph, {"first", "second"}) == {"x": list(graph.node)}
    assert matmuls_by_input(graph, {"second"}) == {"x": [graph.node[1]]}
