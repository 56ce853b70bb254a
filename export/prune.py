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

from export.losses import forward_kl


@dataclass(frozen=True, slots=True)
class Removal:
    """Layer `layer` of the teacher went; from then on KL(teacher ‖ pruned) was `kl` nats."""

    layer: int
    kl: float


@torch.inference_mode()
def rank_layers(
    teacher: Any,
    texts: Sequence[tuple[torch.Tensor, int]],
    num_removed: int,
    *,
    num_candidates: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Removal]:
    """Choose `num_removed` layers to drop, greedily.

    `texts` are (token ids `(T,)`, prompt length): the KL is averaged over completion positions.
    After the first round, which tries every layer, only the `num_candidates` cheapest are tried.
    """
    all_layers = teacher.model.layers
    layers = list(range(len(all_layers)))
    targets = [_completion_logits(teacher, *text) for text in texts]
    removals: list[Removal] = []
    candidates = layers[1:-1]
    total = len(candidates) + (num_removed - 1) * num_candidates
    done = 0
    for _ in range(num_removed):
        costs = {}
        for layer in candidates:
            teacher.model.layers = nn.ModuleList(all_layers[i] for i in layers if i != layer)
            costs[layer] = _mean_kl(teacher, texts, targets)
            done += 1
            progress(done, total)
        best = min(costs, key=costs.__getitem__)
        removals.append(Removal(best, costs[best]))
        layers.remove(best)
        candidates = sorted(costs, key=costs.__getitem__)[1 : num_candidates + 1]
    teacher.model.layers = all_layers
    return removals


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


def _completion_logits(model: Any, token_ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Return the logits `(T - prompt, V)` that predict the completion's tokens."""
    hidden = model.model(token_ids[None], use_cache=False).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden[0, prompt_length - 1 : -1])
    return logits


def _mean_kl(
    model: Any, texts: Sequence[tuple[torch.Tensor, int]], targets: Sequence[torch.Tensor]
) -> float:
    kls = [
        forward_kl(_completion_logits(model, *text), target)
        for text, target in zip(texts, targets, strict=True)
    ]
    return float(torch.cat(kls).mean())
