"""The variants of a float32 graph (`quantize_variant`), and which grid each weight is put on.

* weight-only: every matrix product with a constant weight, the head included, becomes
  `MatMulNBits`, blocks of weights along the input dimension sharing a scale. Accuracy level 4 also
  rounds the activations to int8, which is what makes the CPU kernels fast.
* dynamic and static int8: `export.graph.int8`. float16 and bfloat16: `export.graph.half_precision`.

The linear layer of a node is the last module in the node's name: `qkv_proj` of
`/model/layers.0/self_attn/qkv_proj/MatMul`. What each variant costs is for the gates to say
(`export.measure.held_out`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx
import torch
from onnx import numpy_helper

from export.graph.grid_graph import matmul_weight, matmuls_by_input, replace_matmuls
from export.graph.half_precision import to_half
from export.graph.int8 import quantize_dynamic, quantize_static, quiet
from export.graph.surgery import load_untied, save_onnx
from export.run.errors import ExportError
from export.run.variants import DynamicVariant, HalfVariant, StaticVariant, WeightOnlyVariant
from export.student.grid import BlockGrid, GridWeight
from export.teacher.examples import Example

_QUANTIZED_OPS = (
    "MatMulNBits",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLinear",
    "QLinearMatMul",
    "QuantizeLinear",
    "DequantizeLinear",
)
# What the graph computes in one product: `export.graph.trace`.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


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
        case WeightOnlyVariant(method="gptq"):
            model = load_untied(source)
            replace_matmuls(model, gptq_weights(source, config, texts), config.accuracy_level)
        case WeightOnlyVariant():
            model = quantize_by_rounding(load_untied(source), config)
        case DynamicVariant():
            model = quantize_dynamic(source, target, config)
        case StaticVariant():
            model = quantize_static(source, target, config, texts)
        case HalfVariant():
            model = to_half(onnx.load(source / "model.onnx"), config.method)
    save_onnx(model, target)


def quantize_trained(
    source: Path, target: Path, config: WeightOnlyVariant, weights: Mapping[str, GridWeight]
) -> None:
    """Write the graph in `source` with the very codes and scales that its student was trained to.

    `weights` are those of all linear layers by module name (`export.student.grid_training`).
    """
    model = load_untied(source)
    replace_matmuls(model, pack_by_node(weights, float_matmuls(model)), config.accuracy_level)
    target.mkdir(parents=True, exist_ok=True)
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


# -- rtn and hqq ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """How some nodes are rounded: `bits` 4 or 8, weights per scale, onnxruntime's accuracy level
    (0 to 4). hqq has zero points in float32 whatever `symmetric` says, which no accuracy level
    makes faster."""

    bits: int
    block_size: int
    accuracy_level: int = 4
    symmetric: bool = True
    method: Literal["rtn", "hqq"] = "rtn"


def quantize_by_rounding(model: onnx.ModelProto, config: WeightOnlyVariant) -> onnx.ModelProto:
    """Return `model` quantized by rtn or hqq, nodes of the same grid in one pass; consumes it."""
    assert config.method != "gptq"
    nodes: dict[WeightOnly, list[str]] = {}
    for name in float_matmuls(model):
        grid = grid_of_node(name, config)
        recipe = WeightOnly(
            grid.bits, grid.block_size, config.accuracy_level, config.symmetric, config.method
        )
        nodes.setdefault(recipe, []).append(name)
    for recipe, names in nodes.items():
        model = quantize_weights(model, recipe, names)
    return model


def quantize_weights(
    model: onnx.ModelProto, recipe: WeightOnly, nodes: Collection[str] | None = None
) -> onnx.ModelProto:
    """Return `model` with the matrix products in `nodes`, by default all, quantized.

    Consumes `model`.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if recipe.method == "hqq":
        assert recipe.bits == 4, "refused by the recipe's schema"
        algorithm = nbits.HQQWeightOnlyQuantConfig(recipe.block_size, recipe.bits)
    else:
        algorithm = nbits.DefaultWeightOnlyQuantConfig(
            block_size=recipe.block_size,
            is_symmetric=recipe.symmetric,
            accuracy_level=recipe.accuracy_level,
            bits=recipe.bits,
        )
    kept = [] if nodes is None else sorted({*float_matmuls(model)} - {*nodes})
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=algorithm, nodes_to_exclude=kept)
    with quiet():
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


# -- gptq -----------------------------------------------------------------------------------------


def gptq_weights(
    source: Path,
    config: WeightOnlyVariant,
    texts: Sequence[Example],
    max_hessian_bytes: int = 2**30,
) -> dict[str, GridWeight]:
    """Quantize the matrix products of the graph in `source` (`export.graph.gptq`): name -> weight.

    The first `num_calibration_texts` texts are read once per `max_hessian_bytes` of Hessians.
    Raises ExportError without any text, and for a grid that is not symmetric.
    """
    from export.graph.calibration import calibration_texts, collect_hessians, hessian_groups
    from export.graph.gptq import gptq

    if not config.symmetric:
        raise ExportError("gptq: symmetric is false; gptq quantizes to symmetric grids only")
    texts = calibration_texts(config, texts)
    model = load_untied(source)
    products = matmuls_by_input(model.graph, float_matmuls(model))
    num_channels = {name: matmul_weight(model.graph, p[0]).dims[0] for name, p in products.items()}
    weights = {}
    for group in hessian_groups(num_channels, max_hessian_bytes):
        for name, hessian in collect_hessians(source, group, texts).items():
            for node in products[name]:
                values = numpy_helper.to_array(matmul_weight(model.graph, node))
                grid = grid_of_node(node.name, config)
                weights[node.name] = gptq(torch.from_numpy(values.T.copy()), hessian, grid)
    return weights


# -- names of nodes and modules -------------------------------------------------------------------


def grid_of_node(node_name: str, config: WeightOnlyVariant) -> BlockGrid:
    """Return the grid that `config` has for a node's linear layer."""
    grid = config.grid_of(PurePosixPath(node_name).parent.name)
    return BlockGrid(grid.bits, grid.block_size)


def module_names(node_name: str) -> tuple[str, ...]:
    """Return the modules of the transformers model that a node computes.

    >>> module_names("/model/layers.3/self_attn/qkv_proj/MatMul")[:2]
    ('model.layers.3.self_attn.q_proj', 'model.layers.3.self_attn.k_proj')
    >>> module_names("/lm_head/MatMul")
    ('lm_head',)
    """
    *parents, linear = PurePosixPath(node_name).parts[1:-1]
    return tuple(".".join([*parents, name]) for name in _PACKED.get(linear, (linear,)))


def split_by_module(
    weights: Mapping[str, GridWeight], sizes: Callable[[str], int]
) -> dict[str, GridWeight]:
    """Return the weights of nodes by module; `sizes` says how many outputs a module has."""
    split = {}
    for node_name, weight in weights.items():
        names = module_names(node_name)
        num_outputs = [sizes(name) for name in names]
        parts = zip(weight.codes.split(num_outputs), weight.scales.split(num_outputs), strict=True)
        for name, (codes, scales) in zip(names, parts, strict=True):
            split[name] = GridWeight(weight.grid, codes.contiguous(), scales.contiguous())
    return split


def pack_by_node(
    weights: Mapping[str, GridWeight], node_names: Iterable[str]
) -> dict[str, GridWeight]:
    """Undo `split_by_module`: the weights of modules by node, no module left over."""
    names = {node_name: module_names(node_name) for node_name in node_names}
    modules = [name for group in names.values() for name in group]
    assert sorted(modules) == sorted(weights), set(modules).symmetric_difference(weights)
    packed = {}
    for node_name, group in names.items():
        parts = [weights[name] for name in group]
        (grid,) = {part.grid for part in parts}
        codes, scales = [p.codes for p in parts], [p.scales for p in parts]
        packed[node_name] = GridWeight(grid, torch.cat(codes), torch.cat(scales))
    return packed
