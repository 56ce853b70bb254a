"""Distillation losses over completion tokens, in nats. Formulas and traps: see each docstring.

Everything is summed, never averaged, over tokens: the caller divides by the number of completion
tokens in the whole optimizer step, so that neither padding, nor duplication, nor the split into
micro-batches changes the gradient.

The teacher's side is its logits, or what a cache kept of them: `SparseTargets`, `RandomTargets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch.nn import functional as F

from export.run.errors import ExportError
from serve.text.real_tokens import EVERY_ROW, RealTokens

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

_NUM_SLICE_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tensors that all have one row per completion position."""

    token_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def split(self, size: int) -> list[Self]:
        """Return the rows in slices of `size`, the last one shorter, as `Tensor.split` does."""
        slices = {name: tensor.split(size) for name, tensor in self._tensors().items()}
        num_slices = len(slices["token_ids"])
        return [replace(self, **{n: s[i] for n, s in slices.items()}) for i in range(num_slices)]

    def to(self, device: torch.device) -> Self:
        """Return the rows on `device`."""
        return replace(self, **{n: tensor.to(device) for n, tensor in self._tensors().items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of all `parts`, which must be of one kind, one after the other."""
        tensors = [part._tensors() for part in parts]
        return cls(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class SparseTargets(_Rows):
    """The teacher's likeliest K tokens and the mass of all others.

    `token_ids` `(N, K)` int64, `logprobs` `(N, K)` float32 of the untempered softmax over the whole
    vocabulary, `tail_logprob` `(N,)` the log of what is left over. A divergence with the tail as
    one bucket is ≥ 0 and ≤ the full one (data processing inequality).

    Without a tail the missing mass is dropped. That is right when K is the whole vocabulary; else
    the value is wrong to either side and, worse, smallest where the student gives the listed tokens
    all its mass: for T = [.6, .3, .07, .03], S = [.4, .3, .2, .1] and K = 2 it is .2433, where the
    full KL is .1337 and the tail bucket gives .1334.
    """

    logprobs: torch.Tensor
    tail_logprob: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RandomTargets(_Rows):
    """Tokens drawn from the teacher: random-sampling KD ("Sparse Logit Sampling", Anshumann 2025).

    `token_ids` `(N, K)` int64, drawn with replacement from a proposal g; `weights` `(N, K)`
    float32, p / (K g) each, so 1 / K when the proposal is the teacher itself; `entropy` `(N,)` of
    the teacher, in nats, which turns the cross-entropy to the draws into a KL.

    Loss and gradient equal those of the full softmax in expectation, so that a row's loss may be
    negative.
    """

    weights: torch.Tensor
    entropy: torch.Tensor


Targets = torch.Tensor | SparseTargets | RandomTargets
"""The teacher's side: logits `(N, V)` of any float dtype, or what a cache kept of them."""


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """α·T²·D(teacher_T, student_T) + (1 − α)·CE(student, labels); Hinton et al. 2015, section 2.

    `temperature` T softens both sides; T² keeps the gradient's size when T changes. `divergence` D
    is KL(teacher ‖ student), KL(student ‖ teacher) or the generalised JSD, in which `jsd_beta` is
    the weight of the teacher. What is not in `real_tokens` is left out on both sides, and the rest
    renormalised.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    divergence: Divergence = "forward_kl"
    jsd_beta: float = 0.5
    real_tokens: RealTokens = EVERY_ROW

    def __call__(
        self, student_logits: torch.Tensor, teacher: Targets, labels: torch.Tensor
    ) -> LossSums:
        """Sum the loss over N tokens: logits `(N, V)` of any float dtype, labels `(N,)`.

        ExportError when the vocabularies differ in size, and what `check_sparse` raises.
        """
        wants_gradient = torch.is_grad_enabled() and student_logits.requires_grad
        total, soft, hard = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
            student_logits, self, teacher, labels, wants_gradient
        )
        return LossSums(total, soft, hard, len(labels))

    def check_sparse(self) -> None:
        """Raise ExportError unless the loss is defined on `SparseTargets` and `RandomTargets`.

        What a tail bucket or a draw at T = 1 becomes at another T depends on logits that were not
        kept.
        """
        if self.temperature != 1.0:
            raise ExportError(
                f"temperature {self.temperature} needs all of the teacher's logits: set it to 1 "
                "for a cache of kind top_k or random_sampling, or choose kind dense"
            )

    def sums(
        self, student_logits: torch.Tensor, teacher: Targets, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return total, soft and hard sum by plain autograd: 5 to 15 float32 copies of the logits.

        `__call__` does this for a few rows at a time.
        """
        student = self.real_tokens.cut(student_logits).float()
        if isinstance(teacher, torch.Tensor):
            soft = self._soft_dense(student, self.real_tokens.cut(teacher)).sum()
        else:
            soft = self._soft_sparse(student, teacher).sum()
        hard = F.cross_entropy(student, labels, reduction="sum")
        total = self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard
        return total, soft, hard

    def _soft_dense(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if student.shape != teacher.shape:
            raise ExportError(
                f"the student's logits have {student.shape[1]} columns, the teacher's "
                f"{teacher.shape[1]}: if both share a tokenizer, set real_tokens to its tokens"
            )
        return self._of_logprobs(
            _logprobs(student, self.temperature), _logprobs(teacher, self.temperature)
        )

    def _soft_sparse(
        self, student: torch.Tensor, teacher: SparseTargets | RandomTargets
    ) -> torch.Tensor:
        self.check_sparse()
        if isinstance(teacher, SparseTargets) and teacher.tail_logprob is not None:
            target = torch.cat([teacher.logprobs, teacher.tail_logprob[:, None]], 1)
            return self._of_logprobs(_bucketed_logprobs(student, teacher.token_ids), target)
        if self.divergence != "forward_kl":
            raise ExportError(
                f"divergence {self.divergence!r} needs the teacher's probability of every token "
                "or a tail bucket: choose forward_kl, or a cache of kind dense or top_k"
            )
        listed = student.gather(1, teacher.token_ids) - student.logsumexp(-1, keepdim=True)
        if isinstance(teacher, SparseTargets):
            return forward_kl_of_logprobs(listed, teacher.logprobs)
        return -(teacher.weights * listed).sum(-1) - teacher.entropy

    def _of_logprobs(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.divergence == "forward_kl":
            return forward_kl_of_logprobs(student, teacher)
        if self.divergence == "reverse_kl":
            return reverse_kl_of_logprobs(student, teacher)
        return jsd_of_logprobs(student, teacher, self.jsd_beta)


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over `num_tokens` tokens, in nats: what is minimised, and its two terms apart.

    `soft` is D(teacher_T, student_T) without T² and α; `hard` is the cross-entropy.
    """

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    num_tokens: int


class _SlicedLoss(torch.autograd.Function):
    """A `DistillationLoss` whose gradient is made with it, a slice of rows at a time.

    All that outlives a slice is the gradient, in the logits' own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: torch.Tensor,
        loss: DistillationLoss,
        teacher: Targets,
        labels: torch.Tensor,
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        gradient = torch.empty_like(student_logits) if wants_gradient else None
        totals = torch.zeros(3, device=student_logits.device)
        starts = range(0, max(len(labels), 1), _NUM_SLICE_ROWS)
        for start, teacher_rows in zip(starts, teacher.split(_NUM_SLICE_ROWS), strict=True):
            rows = slice(start, start + _NUM_SLICE_ROWS)
            student = student_logits[rows].detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                sums = loss.sums(student, teacher_rows, labels[rows])
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(sums[0], student)
            totals += torch.stack(sums).detach()
        ctx.gradient = gradient
        total, soft, hard = totals.unbind()
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * grad_total, None, None, None, None


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return KL(teacher_T ‖ student_T) per token: `(N, V)`, `(N, V)` -> `(N,)` float32, in nats."""
    return forward_kl_of_logprobs(
        _logprobs(student_logits, temperature), _logprobs(teacher_logits, temperature)
    )


def forward_kl_of_logprobs(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) per token from log-probabilities: `(N, V)` -> `(N,)`."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl_of_logprobs(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(student ‖ teacher) per token from log-probabilities: `(N, V)` -> `(N,)`."""
    return forward_kl_of_logprobs(student=teacher, teacher=student)


def jsd_of_logprobs(
    student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """Return β KL(teacher ‖ M) + (1 − β) KL(student ‖ M), M = β teacher + (1 − β) student.

    From log-probabilities, per token: `(N, V)` -> `(N,)`. Agarwal et al. 2024 (GKD), section 2.
    At β = 0 and 1 it vanishes whatever the models; divided by β it tends to KL(teacher ‖ student)
    as β → 0, and divided by 1 − β to KL(student ‖ teacher) as β → 1.
    """
    assert 0 < beta < 1, beta
    log_ratio = student - teacher
    # log(M / p) and log(M / q) share this term, which never overflows and is exactly 0 at p = q.
    weight = torch.where(log_ratio > 0, log_ratio.new_tensor(beta), log_ratio.new_tensor(1 - beta))
    shared = torch.log1p(weight * torch.expm1(-log_ratio.abs()))
    of_teacher = -teacher.exp() * (shared + log_ratio.relu())
    of_student = -student.exp() * (shared + (-log_ratio).relu())
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def exact_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Return log softmax in float64: `(N, V)` -> `(N, V)`."""
    return F.log_softmax(logits.double(), -1)


def _logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log softmax at T in float32: `(N, V)` -> `(N, V)`."""
    return F.log_softmax(logits.float() / temperature, -1)


def _bucketed_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the listed tokens and, last, of all others: `(N, K + 1)`.

    The rest is summed by itself: 1 − Σ listed would lose the digits of a small tail.
    """
    listed = logits.gather(1, token_ids)
    rest = logits.scatter(1, token_ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([listed, rest], 1).log_softmax(-1)
