"""Train the student towards the teacher on the teacher's own completions.

One optimizer step takes several micro-batches of right-padded rows. Losses are sums divided by the
completion tokens of the whole step. Head and loss run in slices of positions, so that logits over
a large vocabulary never exist for more than `HEAD_SLICE` tokens. bfloat16 autocast over float32
weights; softmax and loss in float32.

Right padding needs no mask: attention is causal, and only completion positions enter the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from export.losses import DistillationLoss, LossSums

HEAD_SLICE = 256


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the teacher's completion of it, EOS included where the teacher emitted it."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How to train. A step takes examples until it holds `tokens_per_step` completion tokens;
    a micro-batch holds at most `tokens_per_micro_batch` tokens, padding included."""

    num_epochs: int = 1
    learning_rate: float = 3e-4
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_step: int = 2048
    tokens_per_micro_batch: int = 2048
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: mean loss terms over its completion tokens, in nats per token."""

    step: int
    total: float
    soft: float
    hard: float
    num_tokens: int
    learning_rate: float


class Pair:
    """Student and teacher on the same input.

    The lowest `num_shared_layers` layers of the student are the teacher's own and frozen, with the
    embedding and the head (tied or not): they run once for both, and no gradient enters them.
    """

    def __init__(self, student: Any, teacher: Any, num_shared_layers: int = 0) -> None:
        self.student = student
        self.teacher = teacher.eval()
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


def train(
    pair: Pair,
    examples: Sequence[Example],
    plan: TrainingPlan,
    on_step: Callable[[StepRecord, int], None] = lambda record, num_steps: None,
) -> list[StepRecord]:
    """Train the student in place and return one record per step.

    `on_step` gets each record and the total number of steps.
    """
    student = pair.student
    steps = [step for epoch in range(plan.num_epochs) for step in plan_steps(examples, plan, epoch)]
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )
    records = []
    student.train()
    for index, micro_batches in enumerate(steps):
        rate = plan.learning_rate * schedule(index, len(steps), plan.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = accumulate(pair, micro_batches, plan.loss)
        torch.nn.utils.clip_grad_norm_(trainable, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = _record(index, sums, rate)
        records.append(record)
        on_step(record, len(steps))
    student.eval()
    return records


def accumulate(
    pair: Pair, micro_batches: Sequence[Sequence[Example]], loss: DistillationLoss
) -> LossSums:
    """Add one step's gradients to the student's parameters; returns the step's loss sums."""
    device = next(pair.student.parameters()).device
    num_tokens = sum(len(e.completion_token_ids) for batch in micro_batches for e in batch)
    parts = []
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for batch in micro_batches:
            parts.append(_backward(pair, batch, loss, num_tokens, device))
    return LossSums(
        torch.stack([p.total for p in parts]).sum(),
        torch.stack([p.soft for p in parts]).sum(),
        torch.stack([p.hard for p in parts]).sum(),
        num_tokens,
    )


def _backward(
    pair: Pair,
    batch: Sequence[Example],
    loss: DistillationLoss,
    num_tokens: int,
    device: torch.device,
) -> LossSums:
    """Run one micro-batch forwards and backwards, its loss divided by `num_tokens`."""
    input_ids, positions, labels = (t.to(device) for t in collate(batch))
    hidden, target = (h.flatten(0, 1)[positions] for h in pair.hidden(input_ids))
    leaf = hidden.detach().requires_grad_()
    sums = []
    for part, target_part, label_part in zip(
        leaf.split(HEAD_SLICE), target.split(HEAD_SLICE), labels.split(HEAD_SLICE), strict=True
    ):
        with torch.no_grad():
            teacher_logits = pair.teacher.lm_head(target_part)
        slice_sums = loss(pair.student.lm_head(part), teacher_logits, label_part)
        (slice_sums.total / num_tokens).backward()
        sums.append(slice_sums)
    hidden.backward(leaf.grad)
    return LossSums(
        torch.stack([s.total.detach() for s in sums]).sum(),
        torch.stack([s.soft for s in sums]).sum(),
        torch.stack([s.hard for s in sums]).sum(),
        len(labels),
    )


def collate(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids `(B, T)`, flat positions `(N,)` that predict completions, labels `(N,)`.

    The positions come from lengths, never from token values: the pad id may equal the EOS id.
    """
    width = max(map(len, batch)) - 1
    rows: list[list[int]] = []
    positions: list[int] = []
    labels: list[int] = []
    for row, example in enumerate(batch):
        token_ids = [*example.prompt_token_ids, *example.completion_token_ids]
        start = row * width + len(example.prompt_token_ids) - 1
        positions += range(start, start + len(example.completion_token_ids))
        labels += example.completion_token_ids
        rows.append(token_ids[:-1] + [0] * (width - len(token_ids) + 1))
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(labels)


def plan_steps(
    examples: Sequence[Example], plan: TrainingPlan, epoch: int
) -> Iterator[list[list[Example]]]:
    """Yield optimizer steps, each a list of micro-batches of examples of similar length."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    step: list[Example] = []
    num_tokens = 0
    for index in torch.randperm(len(examples), generator=generator).tolist():
        step.append(examples[index])
        num_tokens += len(examples[index].completion_token_ids)
        if num_tokens >= plan.tokens_per_step:
            yield list(_micro_batches(step, plan.tokens_per_micro_batch))
            step, num_tokens = [], 0
    if step:
        yield list(_micro_batches(step, plan.tokens_per_micro_batch))


def _micro_batches(step: list[Example], max_tokens: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in sorted(step, key=len):
        if batch and len(example) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def schedule(step: int, num_steps: int, warmup_share: float) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine down to a tenth."""
    warmup = max(round(num_steps * warmup_share), 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _record(step: int, sums: LossSums, rate: float) -> StepRecord:
    return StepRecord(
        step=step,
        total=float(sums.total) / sums.num_tokens,
        soft=float(sums.soft) / sums.num_tokens,
        hard=float(sums.hard) / sums.num_tokens,
        num_tokens=sums.num_tokens,
        learning_rate=rate,
    )
