"""GPTQ on the grid of `MatMulNBits` (Frantar et al. 2023, "GPTQ", Algorithm 1).

Inputs are quantized one after the other; what rounding one of them adds to the layer's output is
taken out again by the inputs still to come, as far as the calibration text lets them.
"""

from __future__ import annotations

import torch

from export.grid import BlockGrid, GridWeight, least_squares_scales

# Of the mean diagonal; the paper's section 3.3, step 3.
DAMPENING = 0.01
# Columns whose updates of later columns are done at once; B of the paper's section 3.3, step 2.
LAZY_BATCH_SIZE = 128


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: BlockGrid) -> GridWeight:
    """Quantize `(N, K)` so that the layer's output on the calibration text changes little.

    `hessian` is 2 X Xᵀ, `(K, K)`, of the layer's inputs. A block's scales are chosen when its
    first column is reached, from the weights as updated by then.
    """
    remaining = weight.to(torch.float32, copy=True)
    factor = inverse_hessian_factor(hessian)
    num_outputs, num_inputs = remaining.shape
    codes = torch.zeros(num_outputs, num_inputs, dtype=torch.int8)
    scales = torch.zeros(num_outputs, grid.num_blocks(num_inputs))
    # A multiple of the block size: blocks never straddle two batches.
    batch_size = max(LAZY_BATCH_SIZE, grid.block_size)
    for start in range(0, num_inputs, batch_size):
        batch = slice(start, min(start + batch_size, num_inputs))
        blocks = slice(start // grid.block_size, -(-batch.stop // grid.block_size))
        errors = _quantize_batch(
            remaining[:, batch], factor[batch, batch], grid, codes[:, batch], scales[:, blocks]
        )
        remaining[:, batch.stop :].addmm_(errors, factor[batch, batch.stop :], alpha=-1)
    return GridWeight(grid, codes, scales)


def _quantize_batch(
    weight: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Fill `codes` and `scales` of some columns; return the errors `(N, columns)` to be undone.

    `weight` is `(N, columns)` and changed; `factor` is the part of the Hessian's for the columns.
    """
    errors = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        block, offset = divmod(column, grid.block_size)
        if offset == 0:
            scale = least_squares_scales(weight[:, column : column + grid.block_size], grid)[:, 0]
            inverse = torch.where(scale == 0, 0.0, 1 / scale)
            scales[:, block] = scale
        code = (weight[:, column] * inverse).round_().clamp_(grid.min_code, grid.max_code)
        codes[:, column] = code.to(torch.int8)
        errors[:, column] = (weight[:, column] - code * scale) / factor[column, column]
        weight[:, column:].addr_(errors[:, column], factor[column, column:], alpha=-1)
    return errors


def inverse_hessian_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, `(K, K)` float32.

    A channel that was always zero gets the mean diagonal (or 1), so it is rounded to the nearest
    by itself.
    """
    damped = hessian.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean().item() or 1.0
    diagonal += torch.where(diagonal == 0, mean, DAMPENING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
