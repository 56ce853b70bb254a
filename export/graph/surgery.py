"""The traced graph made small: norms fused, lengths from the mask, a head that skips rows.

onnxruntime's own fusions join residual additions and RMS norms. A protobuf ends at 2 GB, and its
Python classes serialise themselves whole to copy themselves: the fusions see a graph without its
weights, which are handed over tensor by tensor. `export.graph.trace` says what the file holds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
LOGIT_ROWS = "logit_rows"
DATA_FILE = "model.onnx.data"
EXTERNAL_DATA_THRESHOLD_BYTES = 1024


def operate(model: onnx.ModelProto, max_nodes: int, *, is_tied: bool) -> onnx.ModelProto:
    """Return a traced graph with its norms fused, `logit_rows`, and a tied head's weight once.

    RuntimeError when more than `max_nodes` are left.
    """
    _inline_constants(model.graph)
    _derive_lengths_from_mask(model.graph)
    weights = _detach_weights(model.graph)
    model = fuse_norms(model)
    _attach_weights(model.graph, weights)
    _drop_unused_inputs(model.graph)
    _add_logit_rows(model.graph)
    check_node_count(model, max_nodes)
    if is_tied:
        _tie_head(model.graph)
    return model


def load_untied(folder: Path) -> onnx.ModelProto:
    """Load a graph that `export_onnx` wrote, the head's weight written out for quantizers."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    head = _head_node(graph)
    if head.op_type == "FusedMatMul":
        embedding = numpy_helper.to_array(_initializer(graph, head.input[1]))
        weight = numpy_helper.from_array(np.ascontiguousarray(embedding.T), "head_weight")
        graph.initializer.append(weight)
        head.op_type, head.domain = "MatMul", ""
        head.input[1] = weight.name
        del head.attribute[:]
    return model


def save_onnx(model: onnx.ModelProto, target_dir: Path) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `target_dir`, replacing what is there."""
    path = target_dir / "model.onnx"
    (target_dir / DATA_FILE).unlink(missing_ok=True)
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA_FILE,
        size_threshold=EXTERNAL_DATA_THRESHOLD_BYTES,
    )
    return path


def graph_size_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", DATA_FILE))


def check_node_count(model: onnx.ModelProto, max_nodes: int) -> None:
    """Raise RuntimeError when the fusions did not take: a slow graph is a wrong graph."""
    num_nodes = len(model.graph.node)
    if num_nodes > max_nodes:
        raise RuntimeError(
            f"the exported graph has {num_nodes} nodes, at most {max_nodes} were expected: "
            "a fusion did not take"
        )


def fuse_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fuse RMS norms, and each residual addition with the norm behind it."""
    from onnxruntime.transformers.fusion_simplified_layernorm import (
        FusionSimplifiedLayerNormalization,
        FusionSkipSimplifiedLayerNormalization,
    )
    from onnxruntime.transformers.onnx_model import OnnxModel

    wrapped = OnnxModel(model)
    FusionSimplifiedLayerNormalization(wrapped).apply()
    FusionSkipSimplifiedLayerNormalization(wrapped).apply()
    wrapped.prune_graph()
    wrapped.topological_sort()
    return wrapped.model


def _detach_weights(graph: onnx.GraphProto) -> dict[str, bytes]:
    """Take the matrices out of the graph; their names, types and shapes stay.

    Biases stay: shape inference reads what is added, and without it no norm is fused.
    """
    weights = {}
    for tensor in graph.initializer:
        if len(tensor.dims) > 1 and len(tensor.raw_data) >= EXTERNAL_DATA_THRESHOLD_BYTES:
            weights[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
    return weights


def _attach_weights(graph: onnx.GraphProto, weights: dict[str, bytes]) -> None:
    for tensor in graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights.pop(tensor.name)


def _inline_constants(graph: onnx.GraphProto) -> None:
    """Make initializers of constants, and read an initializer where the tracer copies it."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        (value,) = [a.t for a in node.attribute if a.name == "value"]
        value.name = node.output[0]
        graph.initializer.append(value)
        graph.node.remove(node)
    initializers = {i.name for i in graph.initializer}
    copies = [n for n in graph.node if n.op_type == "Identity" and n.input[0] in initializers]
    for copied in copies:
        _rename_input(graph, copied.output[0], copied.input[0])
        graph.node.remove(copied)


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def _derive_lengths_from_mask(graph: onnx.GraphProto) -> None:
    """Compute what GroupQueryAttention wants straight from the mask, without the tracer's casts."""
    for attention in [n for n in graph.node if n.op_type == "GroupQueryAttention"]:
        attention.input[5:7] = ["last_positions", "mask_width"]
    one = numpy_helper.from_array(np.array([1], dtype=np.int64), "one")
    graph.initializer.append(one)
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["mask_sum"], keepdims=0),
        helper.make_node("Sub", ["mask_sum", "one"], ["last_positions_int64"]),
        helper.make_node(
            "Cast", ["last_positions_int64"], ["last_positions"], to=TensorProto.INT32
        ),
        helper.make_node("Shape", ["attention_mask"], ["mask_width_int64"], start=1, end=2),
        helper.make_node("Cast", ["mask_width_int64"], ["mask_width"], to=TensorProto.INT32),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _drop_unused_inputs(graph: onnx.GraphProto) -> None:
    """Drop `position_ids`: GroupQueryAttention counts positions itself."""
    used = {name for node in graph.node for name in node.input}
    for unused in [i for i in graph.input if i.name not in used]:
        graph.input.remove(unused)


def _add_logit_rows(graph: onnx.GraphProto) -> None:
    """Compute the head for the rows in the optional input `logit_rows` only.

    The input has a default (empty: all rows), so tools that do not know it need not feed it.
    """
    head = _head_node(graph)
    hidden = _before_slices(graph, head.input[0])
    hidden_size = _initializer(graph, head.input[1]).dims[0]
    flat_shape = np.array([-1, hidden_size], dtype=np.int64)
    picked = [
        helper.make_node("Reshape", [hidden, "picked_shape"], ["picked_flat"]),
        helper.make_node("Gather", ["picked_flat", LOGIT_ROWS], ["picked_rows"], axis=0),
        helper.make_node("Unsqueeze", ["picked_rows", "picked_axis"], ["picked"]),
    ]
    everything = [helper.make_node("Identity", [hidden], ["everything"])]
    switch = [
        helper.make_node("Size", [LOGIT_ROWS], ["num_logit_rows"]),
        helper.make_node("Cast", ["num_logit_rows"], ["has_logit_rows"], to=TensorProto.BOOL),
        helper.make_node(
            "If",
            ["has_logit_rows"],
            ["head_input"],
            then_branch=helper.make_graph(picked, "picked_rows", [], [_float_value("picked")]),
            else_branch=helper.make_graph(everything, "all_rows", [], [_float_value("everything")]),
        ),
    ]
    head.input[0] = "head_input"
    position = list(graph.node).index(head)
    for node in reversed(switch):
        graph.node.insert(position, node)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros(0, dtype=np.int64), LOGIT_ROWS),
            numpy_helper.from_array(flat_shape, "picked_shape"),
            numpy_helper.from_array(np.array([0], dtype=np.int64), "picked_axis"),
        ]
    )
    graph.input.append(helper.make_tensor_value_info(LOGIT_ROWS, TensorProto.INT64, ["num_rows"]))


def _tie_head(graph: onnx.GraphProto) -> None:
    """Store a tied embedding once: the head multiplies by its transpose."""
    head = _head_node(graph)
    (embedding,) = [
        n.input[0] for n in graph.node if n.op_type == "Gather" and "input_ids" in n.input
    ]
    graph.initializer.remove(_initializer(graph, head.input[1]))
    head.op_type, head.domain = "FusedMatMul", "com.microsoft"
    head.input[1] = embedding
    head.attribute.append(helper.make_attribute("transB", 1))


def _head_node(graph: onnx.GraphProto) -> onnx.NodeProto:
    (head,) = [node for node in graph.node if "logits" in node.output]
    assert head.op_type in ("MatMul", "FusedMatMul"), f"the head is a {head.op_type}"
    return head


def _before_slices(graph: onnx.GraphProto, name: str) -> str:
    """Walk back over the slices that transformers' `logits_to_keep` leaves in front of the head."""
    producers = {output: node for node in graph.node for output in node.output}
    while producers[name].op_type == "Slice":
        slice_node = producers[name]
        graph.node.remove(slice_node)
        name = slice_node.input[0]
    return name


def _initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    (found,) = [i for i in graph.initializer if i.name == name]
    return found


def _float_value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
