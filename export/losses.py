"""Distillation losses over completion tokens, in nats. Formulas and traps: see each docstring.

Everything is summed, never averaged, over tokens: the caller divides by the number of completion
tokens in the whole optimizer step, so that neither padding, nor duplication, nor the split into
micro-batches changes the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """α·T²·KL(teacher_T ‖ student_T) + (1 − α)·CE(student, labels); Hinton et al. 2015, section 2.

    `temperature` T softens both sides; T² keeps the gradient's size when T changes.
    """

    alpha: float = 0.5
    temperature: float = 2.0

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor
    ) -> LossSums:
        """Sum the loss over N tokens: logits `(N, V)` of any float dtype, labels `(N,)`."""
        soft = forward_kl(student_logits, teacher_logits, self.temperature).sum()
        hard = F.cross_entropy(student_logits.float(), labels, reduction="sum")
        total = self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard
        return LossSums(total, soft.detach(), hard.detach(), len(labels))


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over `num_tokens` tokens, in nats: what is minimised, and its two terms apart.

    `soft` is KL(teacher_T ‖ student_T) without T² and α; `hard` is the cross-entropy.
    """

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    num_tokens: int


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return KL(teacher_T ‖ student_T) per token: `(N, V)`, `(N, V)` -> `(N,)` float32, in nats."""
    student = F.log_softmax(student_logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    return forward_kl_of_logprobs(student, teacher)


def forward_kl_of_logprobs(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) per token from log-probabilities: `(N, V)` -> `(N,)`."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def exact_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Return log softmax in float64: `(N, V)` -> `(N, V)`."""
    return F.log_softmax(logits.double(), -1)


def exact_forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) per token in float64, for measuring: `(N, V)` -> `(N,)`.

    The same number as `estimators.divergence.exact_kl(teacher_logits, student_logits)`, several
    times as fast; a test holds the two together.
    """
    return forward_kl_of_logprobs(exact_logprobs(student_logits), exact_logprobs(teacher_logits))
