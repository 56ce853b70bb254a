"""A smaller student from the teacher's own weights: fewer layers, and narrower MLPs.

The cost of a layer is the KL(teacher ‖ teacher without it) it causes. Layers go one by one, the
next chosen after the last is gone, since two neighbours may each be dispensable but not both.
MLP channels are too many for that: they go by how much they add to the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.run.errors import ExportError
from export.run.files import read_json, write_json
from export.run.settings import PruneConfig
from export.student.losses import forward_kl
from export.teacher.examples import Example, collate
from serve.text.real_tokens import EVERY_ROW, RealTokens

REMOVALS_NAME = "removals.json"
MLP_WIDTH_MULTIPLE = 32
"""So that blocks of 16 and 32 (`export.run.variants.WeightOnlyVariant`) divide down_proj evenly."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Layer `layer` of the teacher went; from then on KL(teacher ‖ pruned) was `kl` nats."""

    layer: int
    kl: float


def write_removals(folder: Path, removals: Sequence[Removal]) -> None:
    write_json(folder / REMOVALS_NAME, [asdict(removal) for removal in removals])


def read_removals(folder: Path) -> list[Removal]:
    """Return the layers that went, in that order; none where the student was not pruned."""
    path = folder / REMOVALS_NAME
    return [Removal(**raw) for raw in read_json(path)] if path.exists() else []


def kept_layers(removals: Sequence[Removal], num_teacher_layers: int) -> list[int]:
    """Return the teacher's layers that the student has."""
    removed = {removal.layer for removal in removals}
    return [layer for layer in range(num_teacher_layers) if layer not in removed]


@torch.inference_mode()
def rank_layers(
    teacher: Any,
    texts: Sequence[Example],
    num_removed: int,
    *,
    first_candidate: int,
    num_candidates: int,
    real_tokens: RealTokens = EVERY_ROW,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Removal]:
    """Choose `num_removed` layers to drop, greedily.

    The KL is over `real_tokens`, averaged over the completion positions of `texts`. The first round
    tries every layer from `first_candidate` on but the last; later ones the `num_candidates`
    cheapest of the round before. ExportError, before any work, when a round would have nothing left
    to try.
    """
    all_layers = teacher.model.layers
    layers = list(range(len(all_layers)))
    candidates = _first_candidates(len(layers), first_candidate)
    total = sum(_round_sizes(len(candidates), num_removed, num_candidates))
    input_ids, positions, _ = (t.to(teacher.device) for t in collate(texts))
    target = real_tokens.cut(_completion_logits(teacher, input_ids, positions))
    removals: list[Removal] = []
    done = 0
    for _ in range(num_removed):
        costs = {}
        for layer in candidates:
            teacher.model.layers = nn.ModuleList(all_layers[i] for i in layers if i != layer)
            pruned = real_tokens.cut(_completion_logits(teacher, input_ids, positions))
            costs[layer] = float(forward_kl(pruned, target).mean())
            done += 1
            progress(done, total)
        best = min(costs, key=costs.__getitem__)
        removals.append(Removal(best, costs[best]))
        layers.remove(best)
        candidates = sorted(costs, key=costs.__getitem__)[1 : num_candidates + 1]
    teacher.model.layers = all_layers
    return removals


def check_removable(num_layers: int, config: PruneConfig) -> None:
    """Raise ExportError unless `rank_layers` can choose as many of `num_layers` as asked."""
    candidates = _first_candidates(num_layers, config.first_candidate)
    _round_sizes(len(candidates), config.num_removed_layers, config.num_candidates)


def _first_candidates(num_layers: int, first_candidate: int) -> list[int]:
    return list(range(num_layers))[first_candidate:-1]


def _round_sizes(num_first: int, num_removed: int, num_candidates: int) -> list[int]:
    """Return how many layers each round tries."""
    sizes: list[int] = []
    for _ in range(num_removed):
        sizes.append(min(num_candidates, sizes[-1] - 1) if sizes else num_first)
        if sizes[-1] < 1:
            raise ExportError(
                f"num_removed_layers {num_removed} is more than {num_first} first candidates and "
                f"num_candidates {num_candidates} allow: remove fewer layers, or allow more of both"
            )
    return sizes


def drop_layers(model: Any, kept: Sequence[int]) -> Any:
    """Return a copy of `model` with only its layers `kept`, in that order."""
    student = copy.deepcopy(model)
    student.model.layers = nn.ModuleList(student.model.layers[i] for i in kept)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(kept)
    for key in ("layer_types", "no_rope_layers"):
        per_layer = getattr(student.config, key, None)
        if per_layer:
            setattr(student.config, key, [per_layer[i] for i in kept])
    return student


@torch.inference_mode()
def rank_channels(model: Any, texts: Sequence[Example]) -> list[torch.Tensor]:
    """Return the importance of every MLP channel, per layer: `(intermediate_size,)` float32.

    The mean of |act(gate) · up| over the completion positions of `texts` (Minitron, Muralidharan et
    al. 2024, section 2.2, by activation) times the norm of the channel's column of down_proj, by
    which it enters the hidden state (as Wanda weighs inputs, Sun et al. 2024, eq. 1).
    """
    input_ids, positions, _ = (t.to(model.device) for t in collate(texts))
    importances: list[torch.Tensor] = []

    def record(down_proj: nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        activations = inputs[0].flatten(0, 1)[positions].float().abs().mean(0)
        importances.append(activations * down_proj.weight.float().norm(dim=0))

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(record) for layer in model.model.layers]
    try:
        model.model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return importances


def shrink_mlp(model: Any, importances: Sequence[torch.Tensor], kept_share: float) -> Any:
    """Return a copy of `model` with about `kept_share` of each layer's MLP channels.

    The most important ones stay, in their order, as many in every layer: see `kept_mlp_width`.
    """
    width = kept_mlp_width(model.config.intermediate_size, kept_share)
    student = copy.deepcopy(model)
    for layer, importance in zip(student.model.layers, importances, strict=True):
        kept = importance.topk(width).indices.sort().values
        _keep_channels(layer.mlp, kept)
    student.config.intermediate_size = width
    return student


def kept_mlp_width(intermediate_size: int, kept_share: float) -> int:
    """Return the share of the width, rounded to a multiple of 32, at least 32, at most all of it.

    >>> kept_mlp_width(1536, 0.7), kept_mlp_width(1536, 0.001), kept_mlp_width(100, 1.0)
    (1088, 32, 100)
    """
    if kept_share == 1.0:
        return intermediate_size
    num_blocks = round(intermediate_size * kept_share / MLP_WIDTH_MULTIPLE)
    return min(max(num_blocks, 1) * MLP_WIDTH_MULTIPLE, intermediate_size)


def _keep_channels(mlp: Any, kept: torch.Tensor) -> None:
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight.detach()[kept])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[kept])
        linear.out_features = len(kept)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, kept])
    mlp.down_proj.in_features = mlp.intermediate_size = len(kept)


def _completion_logits(
    model: Any, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden.flatten(0, 1)[positions])
    return logits
