"""Hidden-state and attention-map matching: the teacher's inside as a target besides its logits.

Both models run on the same right-padded input with `output_hidden_states` and `output_attentions`
(which needs attn_implementation="eager"). Only completion positions count, and they come from
lengths (`export.student.step.collate`), so padding has no part in it: attention is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F


class LayerOutputs(Protocol):
    """What a transformers model returns; a field that was not asked for is None.

    `hidden_states` holds the embeddings and then the output `(B, T, H)` of each layer, the last one
    after the final norm; `attentions` the probabilities `(B, heads, T, T)` of each layer.
    """

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...] | None: ...

    @property
    def attentions(self) -> tuple[torch.Tensor, ...] | None: ...


@dataclass(frozen=True, slots=True)
class LayerMap:
    """For each student layer, the teacher layer whose output and whose attention it matches."""

    hidden: tuple[int, ...]
    attention: tuple[int, ...]

    @classmethod
    def by_depth(cls, num_student_layers: int, num_teacher_layers: int) -> LayerMap:
        """Return an even map that ends at the last layers (Jiao et al. 2020, TinyBERT, 3.1).

        >>> LayerMap.by_depth(3, 6).hidden
        (1, 3, 5)
        """
        layers = tuple(
            -(-(layer + 1) * num_teacher_layers // num_student_layers) - 1
            for layer in range(num_student_layers)
        )
        return cls(layers, layers)

    @classmethod
    def of_pruned(cls, kept_layers: Sequence[int], num_teacher_layers: int) -> LayerMap:
        """Return the map of a student that has the teacher's `kept_layers`, in ascending order.

        A layer attends as its original does. Its output feeds the next kept layer, so it matches
        what that one reads in the teacher: the layer learns to stand in for those dropped after it.

        >>> LayerMap.of_pruned([0, 2, 5], 6)
        LayerMap(hidden=(1, 4, 5), attention=(0, 2, 5))
        """
        reads = [*kept_layers[1:], num_teacher_layers]
        return cls(tuple(layer - 1 for layer in reads), tuple(kept_layers))


@dataclass(frozen=True, slots=True)
class MatchingSums:
    """Sums over `num_tokens` completion positions of the means over layers.

    `hidden_sum` is a relative squared error, without unit; `attention_sum` is in nats. A term whose
    states were not given is 0.
    """

    hidden_sum: torch.Tensor
    attention_sum: torch.Tensor
    num_tokens: int


class Matching(nn.Module):
    """Owns the projections from the student's width to the teacher's, which are trained with it.

    One float32 matrix per student layer: the identity where the widths agree, the identity with
    rows or columns cut off where they do not.
    """

    def __init__(self, layer_map: LayerMap, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.layer_map = layer_map
        # Initialised without the random generator: a run with matching draws what one without does.
        self.projections = nn.ModuleList(
            nn.utils.skip_init(
                nn.Linear, student_width, teacher_width, bias=False, dtype=torch.float32
            )
            for _ in layer_map.hidden
        )
        for projection in self.projections:
            assert isinstance(projection, nn.Linear)
            nn.init.eye_(projection.weight)

    def forward(
        self, student: LayerOutputs, teacher: LayerOutputs, positions: torch.Tensor
    ) -> MatchingSums:
        """Compare both models at the flat `positions` `(N,)` in B·T; gradients enter the student.

        Computed in float32, also under autocast.
        """
        zero = torch.zeros((), device=positions.device)
        with torch.autocast(positions.device.type, enabled=False):
            hidden = zero
            if student.hidden_states is not None and teacher.hidden_states is not None:
                hidden = self._hidden_sum(student.hidden_states, teacher.hidden_states, positions)
            attention = zero
            if student.attentions is not None and teacher.attentions is not None:
                attention = self._attention_sum(student.attentions, teacher.attentions, positions)
        return MatchingSums(hidden, attention, len(positions))

    def _hidden_sum(
        self,
        student: tuple[torch.Tensor, ...],
        teacher: tuple[torch.Tensor, ...],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        terms = []
        for layer, target in enumerate(self.layer_map.hidden):
            projected = self.projections[layer](_rows(student[layer + 1], positions))
            terms.append(relative_squared_error(projected, _rows(teacher[target + 1], positions)))
        return torch.stack(terms).mean(0).sum()

    def _attention_sum(
        self,
        student: tuple[torch.Tensor, ...],
        teacher: tuple[torch.Tensor, ...],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        terms = [
            attention_kl(student[layer], teacher[target], positions)
            for layer, target in enumerate(self.layer_map.attention)
        ]
        return torch.stack(terms).mean(0).sum()


def relative_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return ‖student − teacher‖² / ‖teacher‖² per row: `(N, H)` -> `(N,)` float32, 0 to ∞.

    The mean squared error over the teacher's mean square: the scale of a layer, which differs a
    hundredfold between positions and between depths, drops out. 1 for a student of zeros.
    """
    target = teacher.detach().float()
    return (student.float() - target).square().sum(-1) / target.square().sum(-1)


def attention_kl(
    student: torch.Tensor, teacher: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return KL(teacher ‖ student) of the attention over keys, per query position, in nats.

    Probabilities `(B, heads, T, T)`, the numbers of heads may differ; flat query `positions` `(N,)`
    in B·T -> `(N,)` float32. Heads are summed and the sum is L1-normalised over the keys
    (DeepSeek-V3.2, 2025, section 2.1, warm-up of the indexer, eq. 3).
    """
    target = _mean_attention(teacher.detach(), positions)
    # A probability of exactly 0 (a masked key, or underflow in all heads) has no log.
    log_student = _mean_attention(student, positions).clamp_min(torch.finfo(torch.float32).tiny)
    return F.kl_div(log_student.log(), target, reduction="none").sum(-1)


def _mean_attention(probabilities: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the attention of all heads together at the positions: `(N, T)`, rows that sum to 1."""
    by_query = probabilities.transpose(1, 2).flatten(0, 1)[positions]
    return F.normalize(by_query.float().sum(1), p=1, dim=-1)


def _rows(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)[positions].float()
