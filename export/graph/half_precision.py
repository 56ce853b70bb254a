"""A float graph in float16 or bfloat16: weights, activations and cache; the head stays float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.run.errors import ExportError

_HALF_TYPES = {
    "float16": (TensorProto.FLOAT16, torch.float16),
    "bfloat16": (TensorProto.BFLOAT16, torch.bfloat16),
}


def to_half(model: onnx.ModelProto, method: Literal["float16", "bfloat16"]) -> onnx.ModelProto:
    """Return `model`, as `export_onnx` wrote it, in half precision; consumes it.

    Norms keep their epsilon: it is an attribute in float32, and so is their arithmetic. The head
    and a table tied to it stay float32. Raises ExportError for a weight beyond float16's range.
    """
    onnx_type, dtype = _HALF_TYPES[method]
    graph = model.graph
    head = _head(graph)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name != head.input[1]:
            tensor.CopyFrom(_half_tensor(tensor, onnx_type, dtype))
    for value in _values(graph):
        if value.name != "logits" and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx_type
    _read_as_float32(graph, head)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] == head.input[1]:
            _write_as(graph, node, onnx_type)
            break
    return model


def _half_tensor(tensor: onnx.TensorProto, onnx_type: int, dtype: torch.dtype) -> onnx.TensorProto:
    half = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(dtype)
    if not half.isfinite().all():
        largest = np.abs(numpy_helper.to_array(tensor)).max()
        raise ExportError(
            f"{dtype}: {tensor.name} reaches {largest:g}, beyond {torch.finfo(dtype).max:g}; "
            "use bfloat16"
        )
    # numpy has no bfloat16.
    raw = half.view(torch.int16).numpy().tobytes()
    return helper.make_tensor(tensor.name, onnx_type, tensor.dims, raw, raw=True)


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """Yield the declared values of a graph and of the branches in it."""
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _values(attribute.g)


def _read_as_float32(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    name = f"{node.input[0]}_float32"
    cast = helper.make_node("Cast", [node.input[0]], [name], to=TensorProto.FLOAT)
    graph.node.insert(list(graph.node).index(node), cast)
    node.input[0] = name


def _write_as(graph: onnx.GraphProto, node: onnx.NodeProto, onnx_type: int) -> None:
    name = f"{node.output[0]}_float32"
    cast = helper.make_node("Cast", [name], [node.output[0]], to=onnx_type)
    graph.node.insert(list(graph.node).index(node) + 1, cast)
    node.output[0] = name


def _head(graph: onnx.GraphProto) -> onnx.NodeProto:
    (head,) = [node for node in graph.node if "logits" in node.output]
    return head
