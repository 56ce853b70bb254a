"""The variants of a float32 graph: weight-only, int8 and half precision (`quantize_variant`).

* weight-only: every matrix product with a constant weight, the head included, becomes
  `MatMulNBits`, blocks of `block_size` weights along the input dimension sharing a scale. Accuracy
  level 4 also rounds the activations to int8, which is what makes the CPU kernels fast.
* dynamic and static: int8 weights and activations in all matrix products; attention, norms and
  the cache stay float32.
* float16 and bfloat16: weights, activations and cache; the head stays float32.

What each costs is for the gates to say (`export.evaluate`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.config import (
    DynamicVariant,
    ExportError,
    HalfVariant,
    StaticVariant,
    WeightOnlyVariant,
)
from export.distill import Example
from export.grid import BlockGrid, GridWeight, pack, unpack
from export.onnx_graph import LOGIT_ROWS, load_untied, save_onnx

MAX_HESSIAN_BYTES = 2**30

_QUANTIZED_OPS = (
    "MatMulNBits",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLinear",
    "QLinearMatMul",
    "QuantizeLinear",
    "DequantizeLinear",
)
_HALF_TYPES = {
    "float16": (TensorProto.FLOAT16, torch.float16),
    "bfloat16": (TensorProto.BFLOAT16, torch.bfloat16),
}


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """How `MatMulNBits` nodes are made: `bits` 4 or 8, weights per scale, and onnxruntime's
    accuracy level (0 to 4). hqq has zero points in float32 whatever `symmetric` says, which no
    accuracy level makes faster."""

    bits: int
    block_size: int
    accuracy_level: int = 4
    symmetric: bool = True
    method: Literal["rtn", "hqq", "gptq"] = "rtn"


def quantize_variant(
    source: Path,
    target: Path,
    config: WeightOnlyVariant | DynamicVariant | StaticVariant | HalfVariant,
    texts: Sequence[Example],
) -> None:
    """Write the variant of `source`, a folder of `export_onnx`, as `model.onnx` in `target`.

    gptq and static calibrate on the first `num_calibration_texts` of `texts`. Raises ExportError
    where the method cannot do what `config` asks for.
    """
    target.mkdir(parents=True, exist_ok=True)
    match config:
        case WeightOnlyVariant():
            model = _weight_only(source, config, texts)
        case DynamicVariant():
            model = _dynamic(source, target, config)
        case StaticVariant():
            model = _static(source, target, config, _calibration_texts(config, texts))
        case HalfVariant():
            model = to_half(onnx.load(source / "model.onnx"), config.method)
    save_onnx(model, target)


def float_matmuls(model: onnx.ModelProto) -> list[str]:
    """Return the names of the matrix products whose weights are still in floating point."""
    weights = {i.name for i in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and weights.intersection(node.input)
    ]


def quantized_node_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many nodes of each quantized operator there are; operators without any are left
    out. A static int8 product is a MatMul between two DequantizeLinear."""
    return dict(Counter(n.op_type for n in model.graph.node if n.op_type in _QUANTIZED_OPS))


# -- weight-only ----------------------------------------------------------------------------------


def _weight_only(
    source: Path, config: WeightOnlyVariant, texts: Sequence[Example]
) -> onnx.ModelProto:
    level, is_symmetric, method = config.accuracy_level, config.symmetric, config.method
    body = WeightOnly(config.bits, config.block_size, level, is_symmetric, method)
    head = replace(
        body,
        bits=config.head_bits or config.bits,
        block_size=config.head_block_size or config.block_size,
    )
    if method != "gptq":
        return quantize_weights(load_untied(source), body, head)
    if not is_symmetric:
        raise ExportError("gptq: symmetric is false; gptq quantizes to symmetric grids only")
    return quantize_by_gptq(source, body, head, _calibration_texts(config, texts))


def quantize_weights(
    model: onnx.ModelProto, body: WeightOnly, head: WeightOnly | None = None
) -> onnx.ModelProto:
    """Return `model` with its matrix products quantized by rtn or hqq; consumes `model`.

    The head is quantized as `head` says, by default as all others.
    """
    if head is None or head == body:
        return _quantize_nodes(model, body)
    model = _quantize_nodes(model, body, excluded=[_head(model.graph).name])
    return _quantize_nodes(model, head)


def _quantize_nodes(
    model: onnx.ModelProto, recipe: WeightOnly, excluded: Sequence[str] = ()
) -> onnx.ModelProto:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if recipe.method == "hqq":
        if recipe.bits != 4:
            raise ExportError(
                f"hqq: {recipe.bits} bits; onnxruntime runs its float zero points with 4 bits only"
            )
        algorithm = nbits.HQQWeightOnlyQuantConfig(recipe.block_size, recipe.bits)
    else:
        algorithm = nbits.DefaultWeightOnlyQuantConfig(
            block_size=recipe.block_size,
            is_symmetric=recipe.symmetric,
            accuracy_level=recipe.accuracy_level,
            bits=recipe.bits,
        )
    quantizer = nbits.MatMulNBitsQuantizer(
        model, algo_config=algorithm, nodes_to_exclude=list(excluded)
    )
    with _quiet():
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def quantize_by_gptq(
    source: Path,
    body: WeightOnly,
    head: WeightOnly,
    texts: Sequence[Example],
    max_hessian_bytes: int = MAX_HESSIAN_BYTES,
) -> onnx.ModelProto:
    """Return the graph in `source` with its matrix products quantized by `export.gptq`.

    The texts are read once per `max_hessian_bytes` of Hessians.
    """
    from export.calibration import collect_hessians, hessian_groups
    from export.gptq import gptq

    model = load_untied(source)
    graph = model.graph
    head_name = _head(graph).name
    names = float_matmuls(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.name in names:
            readers.setdefault(node.input[0], []).append(node)
    num_channels = {name: _weight(graph, nodes[0]).dims[0] for name, nodes in readers.items()}
    for group in hessian_groups(num_channels, max_hessian_bytes):
        for name, hessian in collect_hessians(source, group, texts).items():
            for node in readers[name]:
                recipe = head if node.name == head_name else body
                grid = BlockGrid(recipe.bits, recipe.block_size)
                weight = torch.from_numpy(numpy_helper.to_array(_weight(graph, node)).T.copy())
                replace_matmul(model, node, gptq(weight, hessian, grid), recipe.accuracy_level)
    return model


def replace_matmul(
    model: onnx.ModelProto, node: onnx.NodeProto, weight: GridWeight, accuracy_level: int
) -> None:
    """Make `MatMulNBits` of `node`, a MatMul in `model` with a float weight, in place.

    The node is renamed as onnxruntime's own quantizer does; codes and scales stay bit for bit.
    """
    graph, grid = model.graph, weight.grid
    old = _weight(graph, node)
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


def read_grid_weights(model: onnx.ModelProto) -> dict[str, GridWeight]:
    """Return the weight of every `MatMulNBits`, by the name that the node had in the float graph.

    Raises ExportError for a node with zero points: such a weight is on no symmetric grid.
    """
    initializers = {i.name: i for i in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        if len(node.input) > 3 and node.input[3]:
            raise ExportError(f"{node.name} has zero points; only symmetric grids can be read")
        attributes = {a.name: a.i for a in node.attribute}
        grid = BlockGrid(attributes["bits"], attributes["block_size"])
        packed, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
        name = node.name.removesuffix(f"_Q{grid.bits}")
        weights[name] = unpack(packed, scales, grid, attributes["K"])
    return weights


# -- int8 -----------------------------------------------------------------------------------------


def _dynamic(source: Path, target: Path, config: DynamicVariant) -> onnx.ModelProto:
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from transformers import PretrainedConfig

    recipe = AutoQuantizationConfig.avx512_vnni(
        is_static=False, per_channel=config.per_channel, operators_to_quantize=["MatMul"]
    )
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        path = save_onnx(_prepared(source), Path(scratch))
        # It writes a configuration beside the graph; ours is written elsewhere.
        quantizer = ORTQuantizer(path, config=PretrainedConfig())
        with _quiet():
            quantizer.quantize(
                recipe,
                save_dir=Path(scratch) / "quantized",
                file_suffix=None,
                use_external_data_format=True,
            )
        return onnx.load(Path(scratch) / "quantized" / "model.onnx")


def _static(
    source: Path, target: Path, config: StaticVariant, texts: Sequence[Example]
) -> onnx.ModelProto:
    """Quantize by onnxruntime itself: optimum refuses a static graph that has an If.

    Products take uint8 activations and return float32, so nothing else changes its type.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    from export.calibration import TextReader

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    model = _prepared(source)
    # A default that may be fed has onnxruntime warn in each of its sessions.
    (logit_rows,) = [value for value in model.graph.input if value.name == LOGIT_ROWS]
    model.graph.input.remove(logit_rows)
    reader = TextReader(model, texts)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        path, quantized = save_onnx(model, Path(scratch)), Path(scratch) / "quantized.onnx"
        with _quiet():
            quantize_static(
                path,
                quantized,
                reader,
                op_types_to_quantize=["MatMul"],
                per_channel=config.per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                calibrate_method=methods[config.calibration],
                extra_options={
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                    "MatMulConstBOnly": True,
                    # One text after the other: lengths differ, and memory stays small.
                    "CalibStridedMinMax": 1,
                },
            )
        model = onnx.load(quantized)
    model.graph.input.append(logit_rows)
    return model


def _prepared(source: Path) -> onnx.ModelProto:
    """Load the graph with the types that onnxruntime's quantizers look for.

    Their shape inference stops at onnxruntime's own operators; a product of unknown type is an
    error for dynamic quantization, and left out by the static one.
    """
    model = load_untied(source)
    graph = model.graph
    known = {v.name for v in (*graph.value_info, *graph.output)}
    matmuls = [node for node in graph.node if node.op_type == "MatMul"]
    names = dict.fromkeys(name for node in matmuls for name in (node.input[0], node.output[0]))
    graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name not in known
    )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's quantizers from printing, logging lines per node, and torch's warning
    about the read-only arrays that they make tensors of."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            yield
    finally:
        logging.disable(previous)


# -- half precision -------------------------------------------------------------------------------


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


# -- the graph's parts ----------------------------------------------------------------------------


def _head(graph: onnx.GraphProto) -> onnx.NodeProto:
    (head,) = [node for node in graph.node if "logits" in node.output]
    return head


def _weight(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.TensorProto:
    (weight,) = [i for i in graph.initializer if i.name == node.input[1]]
    return weight


def _calibration_texts(
    config: WeightOnlyVariant | StaticVariant, texts: Sequence[Example]
) -> Sequence[Example]:
    if not texts:
        raise ExportError(f"{config.method}: there is no calibration text; at least one is needed")
    return texts[: config.num_calibration_texts]
