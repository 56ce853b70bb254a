"""The grid of onnxruntime's `MatMulNBits`: integer codes, and one scale per block of inputs.

A weight `(N, K)` (outputs, inputs) is cut into blocks of `block_size` along K. A block's weights
are `code * scale` with codes from -2^(bits-1) to 2^(bits-1) - 1. Quantizers (`export.graph.gptq`,
training on the grid in `export.student.grid_training`) choose codes and scales; how they lie in the
ONNX file is decided here, so that what was trained is what is exported, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Which codes there are: `bits` 4 or 8, `block_size` weights per scale."""

    bits: int
    block_size: int

    @property
    def min_code(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def max_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def num_blocks(self, num_inputs: int) -> int:
        return -(-num_inputs // self.block_size)

    def to_blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """Cut `(N, K)` into `(N, num_blocks, block_size)`, zeros behind the last input."""
        num_outputs, num_inputs = weight.shape
        missing = self.num_blocks(num_inputs) * self.block_size - num_inputs
        padded = torch.nn.functional.pad(weight, (0, missing))
        return padded.view(num_outputs, -1, self.block_size)


@dataclass(frozen=True, slots=True)
class GridWeight:
    """A weight on the grid: `codes` int8 `(N, K)`, `scales` float32 `(N, num_blocks)`."""

    grid: BlockGrid
    codes: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return `code * scale`, float32 `(N, K)`."""
        num_inputs = self.codes.shape[1]
        blocks = self.grid.to_blocks(self.codes).float() * self.scales[:, :, None]
        return blocks.flatten(1)[:, :num_inputs]


def absmax_scales(weight: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Return onnxruntime's scales, `(N, K)` -> `(N, num_blocks)`: the largest weight of a block
    gets the lowest code exactly, so a scale has the opposite sign of that weight."""
    blocks = grid.to_blocks(weight)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    return largest / grid.min_code


def inverse_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, and 0 where that would overflow: the codes of such a block are all 0."""
    inverse = 1 / scales
    return inverse.masked_fill_(~inverse.isfinite(), 0.0)


def encode(weight: torch.Tensor, scales: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Return the codes nearest to `weight`, int8 `(N, K)`; see `inverse_scales` for scales of 0."""
    inverse = inverse_scales(scales)[:, :, None]
    blocks = (grid.to_blocks(weight) * inverse).round_().clamp_(grid.min_code, grid.max_code)
    return blocks.to(torch.int8).flatten(1)[:, : weight.shape[1]].contiguous()


def pack(weight: GridWeight) -> tuple[np.ndarray, np.ndarray]:
    """Return `MatMulNBits`'s inputs B `(N, num_blocks, block_size * bits / 8)` uint8, and scales.

    Codes are stored without a sign, 2^(bits-1) added; of two 4-bit codes the first is the low
    half of the byte. Behind the last input the bytes are 0, as onnxruntime leaves them.
    """
    grid = weight.grid
    unsigned = grid.to_blocks((weight.codes.to(torch.int16) - grid.min_code).to(torch.uint8))
    if grid.bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return unsigned.numpy(), weight.scales.float().numpy()
