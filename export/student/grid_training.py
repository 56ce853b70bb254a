"""Quantization-aware training: the student learns on the grid that its ONNX kernel computes with.

Every linear layer holds weights that are on the grid (`export.student.grid`), so the forward pass
is the kernel's own up to float rounding. Behind each stands a latent float weight and a scale per
block; gradients pass the rounding straight through (Bengio et al. 2013), and reach the scales as in
LSQ (Esser et al. 2020, eq. 3). The trained codes and scales are what is exported, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.student.grid import BlockGrid, GridWeight, absmax_scales, encode, inverse_scales

GRID_NAME = "grid.safetensors"
# The scales move by this share of themselves where a weight moves by one learning rate.
SCALE_RATE = 1.0
# Weights per piece: what is made in between stays in the cache of a core.
_PIECE_SIZE = 2**17


class GridParameters:
    """The parameters of a model whose linear layers are held on grids, and its norms.

    Made of `grids`: module name -> grid. `initial` overrides where a layer starts (GPTQ, say);
    others start at onnxruntime's own rounding of their weight. Everything else is frozen.
    """

    def __init__(
        self,
        model: Any,
        grids: Mapping[str, BlockGrid],
        initial: Mapping[str, GridWeight] | None = None,
    ) -> None:
        model.requires_grad_(False)
        self._layers = {
            name: _GridLayer(model.get_submodule(name), grid, (initial or {}).get(name))
            for name, grid in grids.items()
        }
        self._norms = {
            name: parameter.requires_grad_(True)
            for name, parameter in model.named_parameters()
            if "norm" in name
        }

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See `export.student.trainer.Parameters`."""
        weights = [layer.latent for layer in self._layers.values()]
        scales = [layer.log_scale for layer in self._layers.values()]
        return [
            {"params": [*weights, *self._norms.values()], "base_lr": learning_rate},
            {"params": scales, "base_lr": SCALE_RATE * learning_rate, "weight_decay": 0.0},
        ]

    def named(self) -> Mapping[str, torch.Tensor]:
        """See `export.student.trainer.Parameters`."""
        named: dict[str, torch.Tensor] = dict(self._norms)
        for name, layer in self._layers.items():
            named[f"{name}.latent"] = layer.latent
            named[f"{name}.log_scale"] = layer.log_scale
        return named

    def gather_gradients(self) -> None:
        """Pass each weight's gradient through the rounding to the latent weight and the scales."""
        for layer in self._layers.values():
            layer.gather_gradients()

    def publish(self) -> None:
        """Round every latent weight and write it into the model."""
        for layer in self._layers.values():
            layer.publish()

    def grid_weights(self) -> dict[str, GridWeight]:
        """Return what the model computes with: codes and scales by module name."""
        return {name: layer.grid_weight() for name, layer in self._layers.items()}


class _GridLayer:
    """One linear layer: latent weight `(N, K)`, zeros behind it up to whole blocks, and the log of
    each scale over its first value `(N, num_blocks)`."""

    def __init__(self, linear: nn.Linear, grid: BlockGrid, initial: GridWeight | None) -> None:
        device = linear.weight.device
        weight = initial.dequantize() if initial else linear.weight.detach().float().clone()
        scales = initial.scales if initial else absmax_scales(weight, grid)
        self._linear = linear
        self._grid = grid
        self._first_scales = scales.to(device)
        self.latent = nn.Parameter(grid.to_blocks(weight.to(device)).flatten(1).clone())
        self.log_scale = nn.Parameter(torch.zeros_like(self._first_scales))
        linear.weight.requires_grad_(True)
        self.publish()

    @property
    def _scales(self) -> torch.Tensor:
        return self._first_scales * self.log_scale.detach().exp()

    def grid_weight(self) -> GridWeight:
        weight = self.latent.detach()[:, : self._linear.in_features]
        codes = encode(weight, self._scales, self._grid)
        return GridWeight(self._grid, codes.cpu(), self._scales.cpu())

    @torch.no_grad()
    def publish(self) -> None:
        scales = self._scales[:, :, None]
        inverse = inverse_scales(scales)
        for rows in self._pieces():
            codes = (self._latent_blocks(rows) * inverse[rows]).round_()
            codes.clamp_(self._grid.min_code, self._grid.max_code)
            weight = codes.mul_(scales[rows]).flatten(1)
            self._linear.weight.data[rows] = weight[:, : self._linear.in_features]

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """d(code·s)/d(latent) is 1 within the grid and 0 beyond; d(code·s)/ds is code − latent/s
        within and the last code beyond; ds/d(log s) is s."""
        if self._linear.weight.grad is None:
            return  # of several processes, this one had no micro-batch in the step
        scales = self._scales
        inverse = inverse_scales(scales)[:, :, None]
        of_latent, of_scales = torch.empty_like(self.latent), torch.empty_like(scales)
        for rows in self._pieces():
            gradient = self._grid.to_blocks(self._linear.weight.grad[rows])
            exact = self._latent_blocks(rows) * inverse[rows]
            codes = exact.round().clamp_(self._grid.min_code, self._grid.max_code)
            error = codes - exact
            is_beyond = error.abs() > 0.5
            of_scales[rows] = torch.where(is_beyond, codes, error).mul_(gradient).sum(-1)
            of_latent[rows] = gradient.masked_fill(is_beyond, 0.0).flatten(1)
        self.latent.grad = of_latent
        self.log_scale.grad = of_scales.mul_(scales)
        self._linear.weight.grad = None

    def _latent_blocks(self, rows: slice) -> torch.Tensor:
        return self._grid.to_blocks(self.latent.data[rows])

    def _pieces(self) -> list[slice]:
        num_outputs, num_inputs = self.latent.shape
        size = max(_PIECE_SIZE // num_inputs, 1)
        return [slice(start, start + size) for start in range(0, num_outputs, size)]


def untie_head(model: Any) -> None:
    """Give the head a weight of its own: the embedding table stays as it is."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def save_grid_weights(path: Path, weights: Mapping[str, GridWeight]) -> None:
    """Write codes, scales and grids to one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name}.codes"] = weight.codes
        tensors[f"{name}.scales"] = weight.scales
        grid = weight.grid
        tensors[f"{name}.grid"] = torch.tensor([grid.bits, grid.block_size])
    save_file(tensors, path)


def load_grid_weights(path: Path) -> dict[str, GridWeight]:
    """Read what `save_grid_weights` wrote."""
    tensors = load_file(path)
    names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
    return {
        name: GridWeight(
            BlockGrid(*tensors[f"{name}.grid"].tolist()),
            tensors[f"{name}.codes"],
            tensors[f"{name}.scales"],
        )
        for name in names
    }
