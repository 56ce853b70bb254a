"""`MatMulNBits` nodes of a graph and their weights on the grid (`export.student.grid`), bitwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import helper, numpy_helper

from export.student.grid import GridWeight, pack


def matmul_weight(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.TensorProto:
    """Return the constant that a matrix product reads, `(K, N)`."""
    (weight,) = [i for i in graph.initializer if i.name == node.input[1]]
    return weight


def matmuls_by_input(
    graph: onnx.GraphProto, names: Collection[str]
) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes of these names by the tensor that they read, in the graph's order."""
    products: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.name in names:
            products.setdefault(node.input[0], []).append(node)
    return products


def replace_matmuls(
    model: onnx.ModelProto, weights: Mapping[str, GridWeight], accuracy_level: int
) -> None:
    """Make `MatMulNBits` of the nodes in `weights`, node name -> weight, in place."""
    for node in [node for node in model.graph.node if node.name in weights]:
        replace_matmul(model, node, weights[node.name], accuracy_level)


def replace_matmul(
    model: onnx.ModelProto, node: onnx.NodeProto, weight: GridWeight, accuracy_level: int
) -> None:
    """Make `MatMulNBits` of `node`, a MatMul in `model` with a float weight, in place.

    The node is renamed as onnxruntime's own quantizer does; codes and scales stay bit for bit.
    """
    graph, grid = model.graph, weight.grid
    old = matmul_weight(graph, node)
    num_outputs, num_inputs = weight.codes.shape
    assert list(old.dims) == [num_inputs, num_outputs], (node.name, old.dims, weight.codes.shape)
    packed, scales = pack(weight)
    name = old.name
    if not any(name in other.input for other in graph.node if other.output != node.output):
        graph.initializer.remove(old)
    graph.initializer.extend(
        [
            numpy_helper.from_array(packed, f"{name}_Q{grid.bits}"),
            numpy_helper.from_array(scales, f"{name}_scales"),
        ]
    )
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.name = f"{node.name}_Q{grid.bits}"
    node.input[:] = [node.input[0], f"{name}_Q{grid.bits}", f"{name}_scales"]
    attributes = {
        "K": num_inputs,
        "N": num_outputs,
        "bits": grid.bits,
        "block_size": grid.block_size,
        "accuracy_level": accuracy_level,
    }
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
