"""GPTQ on the grid of `MatMulNBits` (Frantar et al. 2023, "GPTQ", Algorithm 1).

Inputs are quantized one after the other; what rounding one of them adds to the layer's output is
taken out again by the inputs still to come, as far as the calibration text lets them. The inputs
with the most signal come first (`act_order` and `static_groups` of the authors' code): scales are
chosen beforehand, so a block's inputs need not be neighbours in that order.
"""

from __future__ import annotations

import torch

from export.student.grid import BlockGrid, GridWeight, absmax_scales, encode, inverse_scales

# Of the mean diagonal; the paper's section 3.3, step 3.
DAMPENING = 0.01
# Inputs whose updates of later inputs are done at once; B of the paper's section 3.3, step 2.
LAZY_BATCH_SIZE = 128
SHRINKS = tuple(1 - 0.025 * step for step in range(15))


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: BlockGrid) -> GridWeight:
    """Quantize `(N, K)` so that the layer's output on the calibration text changes little.

    `hessian` is 2 X Xᵀ, `(K, K)`, of the layer's inputs.
    """
    damped = dampen(hessian)
    signal = damped.diagonal()
    scales = signal_weighted_scales(weight.float(), signal.float(), grid)
    order = signal.argsort(descending=True, stable=True)
    factor = inverse_factor(damped[order][:, order])
    # A row per input, `(K, N)`: what is updated together lies together.
    remaining = weight.float().T[order]
    codes = torch.empty(remaining.shape, dtype=torch.int8)
    for start in range(0, len(order), LAZY_BATCH_SIZE):
        rows, later = slice(start, start + LAZY_BATCH_SIZE), slice(start + LAZY_BATCH_SIZE, None)
        scales_of_rows = scales.T[order[rows] // grid.block_size]
        codes[order[rows]], errors = _quantize_rows(
            remaining[rows], scales_of_rows, factor[rows, rows], grid
        )
        remaining[later].addmm_(factor[rows, later].T, errors, alpha=-1)
    return GridWeight(grid, codes.T.contiguous(), scales)


def _quantize_rows(
    remaining: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor, grid: BlockGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of some inputs and the errors to be undone by later ones, `(inputs, N)`.

    `remaining` and `scales` are `(inputs, N)`, the former changed; `factor` is the part of the
    Hessian's for these inputs.
    """
    codes = torch.empty(remaining.shape, dtype=torch.int8)
    errors = torch.empty_like(remaining)
    inverse = inverse_scales(scales)
    for row, values in enumerate(remaining):
        code = (values * inverse[row]).round_().clamp_(grid.min_code, grid.max_code)
        codes[row] = code.to(torch.int8)
        errors[row] = (values - code * scales[row]) / factor[row, row]
        remaining[row:].addr_(factor[row, row:], errors[row], alpha=-1)
    return codes, errors


def signal_weighted_scales(
    weight: torch.Tensor, signal: torch.Tensor, grid: BlockGrid
) -> torch.Tensor:
    """Return for each block of `(N, K)` the `absmax_scales` times the best of `SHRINKS`.

    Best is the least squared error, each input's weighted by its `signal` `(K,)`: its part of the
    layer's squared output error where inputs are uncorrelated.
    """
    full = absmax_scales(weight, grid)
    best, least = full, torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        scales = full * shrink
        rounded = GridWeight(grid, encode(weight, scales, grid), scales).dequantize()
        error = grid.to_blocks((rounded - weight).square_() * signal).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def dampen(hessian: torch.Tensor) -> torch.Tensor:
    """Return the Hessian in float64 with `DAMPENING` times the mean of its diagonal added to it.

    A channel that was always zero gets the mean (or 1), so it is rounded to the nearest by itself.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    mean = diagonal.mean().item() or 1.0
    diagonal += torch.where(diagonal == 0, mean, DAMPENING * mean)
    return damped


def inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a dampened Hessian, `(K, K)` float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
