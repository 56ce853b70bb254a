"""A smaller student from the teacher's own layers: drop those whose removal costs least.

The cost of a layer is the KL(teacher ‖ teacher without it) it causes. Layers go one by one, the
next chosen after the last is gone, since two neighbours may each be dispensable but not both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from export.config import ExportError
from export.distill import Example, collate
from export.losses import forward_kl


@dataclass(frozen=True, slots=True)
class Removal:
    """Layer `layer` of the teacher went; from then on KL(teacher ‖ pruned) was `kl` nats."""

    layer: int
    kl: float


@torch.inference_mode()
def rank_layers(
    teacher: Any,
    texts: Sequence[Example],
    num_removed: int,
    *,
    first_candidate: int,
    num_candidates: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Removal]:
    """Choose `num_removed` layers to drop, greedily.

    The KL is averaged over the completion positions of `texts`. The first round tries every layer
    from `first_candidate` on but the last; later ones the `num_candidates` cheapest of the round
    before. ExportError, before any work, when a round would have nothing left to try.
    """
    all_layers = teacher.model.layers
    layers = list(range(len(all_layers)))
    candidates = layers[first_candidate:-1]
    total = sum(_round_sizes(len(candidates), num_removed, num_candidates))
    input_ids, positions, _ = collate(texts)
    target = _completion_logits(teacher, input_ids, positions)
    removals: list[Removal] = []
    done = 0
    for _ in range(num_removed):
        costs = {}
        for layer in candidates:
            teacher.model.layers = nn.ModuleList(all_layers[i] for i in layers if i != layer)
            pruned = _completion_logits(teacher, input_ids, positions)
            costs[layer] = float(forward_kl(pruned, target).mean())
            done += 1
            progress(done, total)
        best = min(costs, key=costs.__getitem__)
        removals.append(Removal(best, costs[best]))
        layers.remove(best)
        candidates = sorted(costs, key=costs.__getitem__)[1 : num_candidates + 1]
    teacher.model.layers = all_layers
    return removals


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
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student


def _completion_logits(
    model: Any, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden.flatten(0, 1)[positions])
    return logits
