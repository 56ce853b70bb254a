"""One optimizer step of distillation: text in, gradients on the student out.

A step takes several micro-batches of right-padded rows. Losses are sums divided by the completion
tokens of the whole step, over all processes. Head and loss run in slices of positions, so that
logits over a large vocabulary never exist for more than `HEAD_SLICE` tokens. bfloat16 autocast
over float32 weights unless told otherwise; softmax and loss in float32.

`export.student.trainer` has the loop around this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from export.run.processes import World
from export.student.losses import DistillationLoss, LossSums, Targets, forward_kl
from export.teacher.examples import Example, collate, micro_batches
from serve.text.real_tokens import EVERY_ROW, RealTokens

if TYPE_CHECKING:
    from export.run.training import PhaseConfig
    from export.student.logits_cache import LogitsCache
    from export.student.matching import Matching, MatchingSums

HEAD_SLICE = 256
_MEASURED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class StepObjective:
    """What a step minimises: the loss on tokens, and how much of each matching term is added."""

    loss: DistillationLoss = field(default_factory=DistillationLoss)
    hidden_weight: float = 0.0
    attention_weight: float = 0.0

    @classmethod
    def of(cls, phase: PhaseConfig, real_tokens: RealTokens = EVERY_ROW) -> StepObjective:
        loss = DistillationLoss(
            phase.alpha, phase.temperature, phase.divergence, phase.jsd_beta, real_tokens
        )
        return cls(loss, phase.hidden_weight, phase.attention_weight)


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over the `num_tokens` completion tokens of a step, in nats (`hidden` has no unit).

    `total` is what was minimised; the others are its terms before they are weighted.
    """

    total: float
    soft: float
    hard: float
    hidden: float
    attention: float
    num_tokens: int


class Forward(Protocol):
    """Student and teacher on the same micro-batch."""

    @property
    def student(self) -> Any: ...

    def __call__(
        self, batch: Sequence[Example], input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Outputs: ...


@dataclass(frozen=True, slots=True)
class Outputs:
    """The student's last hidden states `(N, H)` at N positions, and the teacher's side of them in
    slices of `HEAD_SLICE`, made when they are asked for."""

    hidden: torch.Tensor
    targets: Iterator[Targets]
    matching: MatchingSums | None = None


class Pair:
    """A student and a live teacher.

    The lowest `num_shared_layers` layers of the student are the teacher's own and frozen, with the
    embedding and the head (tied or not): they run once for both, and no gradient enters them. With
    `matching` the layers in between are compared as well, which needs all of them: none is shared.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        num_shared_layers: int = 0,
        matching: Matching | None = None,
    ) -> None:
        assert not (matching and num_shared_layers), num_shared_layers
        self.student = student
        self.teacher = teacher.eval()
        self._matching = matching
        self._shared = None
        self._student_stack, self._teacher_stack = student.model, teacher.model
        if num_shared_layers:
            shared = (student.model.embed_tokens, student.lm_head,
                      *student.model.layers[:num_shared_layers])  # fmt: skip
            for module in shared:
                module.requires_grad_(False)
            self._shared = _stack(teacher.model, 0, num_shared_layers, nn.Identity())
            self._student_stack = _stack(student.model, num_shared_layers)
            self._teacher_stack = _stack(teacher.model, num_shared_layers)

    def __call__(
        self, batch: Sequence[Example], input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Outputs:
        """See `Forward`."""
        if self._matching is not None:
            return self._compare(self._matching, input_ids, positions)
        hidden, target = (h.flatten(0, 1)[positions] for h in self.hidden(input_ids))
        return Outputs(hidden, self._targets(target))

    def hidden(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states of student and teacher, `(B, T, H)` each."""
        if self._shared is None:
            with torch.no_grad():
                target = _run(self._teacher_stack, input_ids=input_ids)
            return _run(self._student_stack, input_ids=input_ids), target
        with torch.no_grad():
            shared = _run(self._shared, input_ids=input_ids)
            target = _run(self._teacher_stack, inputs_embeds=shared)
        return _run(self._student_stack, inputs_embeds=shared.float()), target

    def _compare(
        self, matching: Matching, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Outputs:
        wanted = {
            "use_cache": False,
            "output_hidden_states": True,
            "output_attentions": self.student.config._attn_implementation == "eager",
        }
        with torch.no_grad():
            target = self.teacher.model(input_ids=input_ids, **wanted)
        outputs = self.student.model(input_ids=input_ids, **wanted)
        hidden, target_hidden = (
            o.last_hidden_state.flatten(0, 1)[positions] for o in (outputs, target)
        )
        return Outputs(hidden, self._targets(target_hidden), matching(outputs, target, positions))

    def _targets(self, hidden: torch.Tensor) -> Iterator[Targets]:
        for part in hidden.split(HEAD_SLICE):
            with torch.no_grad():
                logits = self.teacher.lm_head(part)
            # Outside: a generator would leave its consumer without gradients.
            yield logits


class CachedPair:
    """A student and what a cache kept of its teacher's logits."""

    def __init__(self, student: Any, cache: LogitsCache) -> None:
        self.student = student
        self._cache = cache

    def __call__(
        self, batch: Sequence[Example], input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Outputs:
        """See `Forward`."""
        hidden = _run(self.student.model, input_ids=input_ids).flatten(0, 1)[positions]
        with torch.autocast(hidden.device.type, enabled=False):
            # Log-probabilities are normalised on reading, which bfloat16 would undo.
            targets = self._cache.targets(batch).to(hidden.device)
        return Outputs(hidden, iter(targets.split(HEAD_SLICE)))


def _stack(decoder: Any, start: int, stop: int | None = None, norm: nn.Module | None = None) -> Any:
    """Return a decoder that shares its layers start..stop with `decoder`, and its final norm."""
    stack = copy.copy(decoder)
    stack._modules = dict(decoder._modules)
    stack.layers = nn.ModuleList(decoder.layers[start:stop])
    stack.norm = norm or decoder.norm
    return stack


def _run(decoder: Any, **inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden


def accumulate(
    forward: Forward,
    micro_batches: Sequence[Sequence[Example]],
    objective: StepObjective,
    *,
    world: World | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StepSums:
    """Add one step's gradients to the student's parameters, and return the step's sums.

    Each process of `world` runs its share of the micro-batches; the sums are over all of them, the
    gradients are not added up here (`World.add_up`). `dtype` is what autocast computes in.
    """
    world = world or World()
    device = next(forward.student.parameters()).device
    num_tokens = sum(len(e.completion_token_ids) for batch in micro_batches for e in batch)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for batch in world.share(micro_batches):
            sums += _backward(forward, batch, objective, num_tokens, device)
    world.add_up([sums])
    total, soft, hard, hidden, attention = sums.tolist()
    return StepSums(total, soft, hard, hidden, attention, num_tokens)


def _backward(
    forward: Forward,
    batch: Sequence[Example],
    objective: StepObjective,
    num_tokens: int,
    device: torch.device,
) -> torch.Tensor:
    """Run a micro-batch forwards and backwards, its loss divided by `num_tokens`: sums `(5,)`."""
    input_ids, positions, labels = (t.to(device) for t in collate(batch))
    outputs = forward(batch, input_ids, positions)
    leaf = outputs.hidden.detach().requires_grad_()
    sums = []
    slices = zip(leaf.split(HEAD_SLICE), outputs.targets, labels.split(HEAD_SLICE), strict=True)
    for part, target, label in slices:
        slice_sums = objective.loss(forward.student.lm_head(part), target, label)
        (slice_sums.total / num_tokens).backward()
        sums.append(slice_sums)
    roots, gradients = [outputs.hidden], [leaf.grad]
    extra, matched = _weigh(outputs.matching, objective, leaf)
    if outputs.matching is not None:
        roots.append(extra / num_tokens)
        gradients.append(None)
    torch.autograd.backward(roots, gradients)
    total, soft, hard = _add(sums)
    return torch.stack([total + extra.detach(), soft, hard, *matched]).double()


def _weigh(
    matching: MatchingSums | None, objective: StepObjective, like: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return what matching adds to the loss, and its two sums."""
    if matching is None:
        zero = torch.zeros((), device=like.device)
        return zero, (zero, zero)
    weighted = (
        objective.hidden_weight * matching.hidden_sum
        + objective.attention_weight * matching.attention_sum
    )
    return weighted, (matching.hidden_sum.detach(), matching.attention_sum.detach())


def _add(sums: Sequence[LossSums]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.stack([s.total.detach() for s in sums]).sum(),
        torch.stack([s.soft for s in sums]).sum(),
        torch.stack([s.hard for s in sums]).sum(),
    )


@torch.no_grad()
def measure_kl(
    forward: Forward,
    examples: Sequence[Example],
    *,
    real_tokens: RealTokens = EVERY_ROW,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Return KL(teacher ‖ student) over the completion tokens, in nats per token, in training's
    arithmetic and over `real_tokens`."""
    device = next(forward.student.parameters()).device
    total, num_tokens = 0.0, 0
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for batch in micro_batches(examples, _MEASURED_TOKENS, len):
            input_ids, positions, labels = (t.to(device) for t in collate(batch))
            outputs = forward(batch, input_ids, positions)
            for part, target in zip(outputs.hidden.split(HEAD_SLICE), outputs.targets, strict=True):
                assert isinstance(target, torch.Tensor), "measured against live teachers"
                student = real_tokens.cut(forward.student.lm_head(part))
                total += float(forward_kl(student, real_tokens.cut(target)).sum())
            num_tokens += len(labels)
    return total / num_tokens


def plan_steps(
    examples: Sequence[Example], phase: PhaseConfig, round_index: int
) -> list[list[list[Example]]]:
    """Return the optimizer steps of a round: lists of micro-batches of examples of similar length.

    A step takes examples in random order until it holds `tokens_per_step` completion tokens; a
    micro-batch holds at most `tokens_per_micro_batch` tokens, padding included.
    """
    generator = torch.Generator().manual_seed(phase.seed * 1_000_003 + round_index)
    order = torch.randperm(len(examples), generator=generator).tolist()
    steps: list[list[Example]] = []
    num_tokens = phase.tokens_per_step
    for example in (examples[index] for index in order):
        if num_tokens >= phase.tokens_per_step:
            steps.append([])
            num_tokens = 0
        steps[-1].append(example)
        num_tokens += len(example.completion_token_ids)
    return [list(micro_batches(step, phase.tokens_per_micro_batch, len)) for step in steps]


def schedule(progress: float, warmup_share: float) -> float:
    """Return the learning rate's factor at a share of the phase, 0 to 1: linear warm-up to 1, then
    a cosine down to a tenth.

    >>> [round(schedule(p, 0.1), 2) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup_share:
        return progress / warmup_share
    decayed = (progress - warmup_share) / (1 - warmup_share)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * decayed))
