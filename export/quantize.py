"""Weight-only quantized variants of a float32 graph, on the grids of onnxruntime's fast kernels.

Every matrix product with a constant weight, the head included, becomes `MatMulNBits`: blocks of
`block_size` weights along the input dimension share a scale. Accuracy level 4 also rounds the
activations to int8, which is what makes the CPU kernels fast; the parity gate measures its cost.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """One variant: `bits` 4 or 8, weights per scale, and onnxruntime's accuracy level (0 to 4)."""

    bits: int
    block_size: int
    accuracy_level: int = 4


def quantize_weights(model: onnx.ModelProto, recipe: WeightOnly) -> onnx.ModelProto:
    """Return `model` with its matrix products quantized by round-to-nearest; consumes `model`."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    # It says two lines per node.
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        model,
        algo_config=DefaultWeightOnlyQuantConfig(
            block_size=recipe.block_size,
            is_symmetric=True,
            accuracy_level=recipe.accuracy_level,
            bits=recipe.bits,
        ),
    )
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def float_matmuls(model: onnx.ModelProto) -> list[str]:
    """Return the names of the matrix products whose weights are still in floating point."""
    weights = {i.name for i in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and weights.intersection(node.input)
    ]
