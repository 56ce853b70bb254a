from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from estimators.divergence import exact_kl
from export.losses import DistillationLoss, exact_forward_kl, forward_kl

TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3)
P, Q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]


def logits(*shape: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def log(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("temperature", "kl", "times_squared"),
    [(1.0, 0.2662167, 0.2662167), (2.0, 0.0784210, 0.3136838), (4.0, 0.0205126, 0.3282022)],
)
def test_soft_loss_is_hintons_reference_value(
    temperature: float, kl: float, times_squared: float
) -> None:
    assert float(forward_kl(STUDENT, TEACHER, temperature)) == pytest.approx(kl, abs=2e-7)
    sums = DistillationLoss(alpha=1.0, temperature=temperature)(STUDENT, TEACHER, torch.tensor([0]))
    assert float(sums.total) == pytest.approx(times_squared, abs=2e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (P, Q, 0.6348972651),
        (Q, P, 0.6758058950),
        ([0.6, 0.3, 0.07, 0.03], [0.4, 0.3, 0.2, 0.1], 0.1336723),
        ([0.6, 0.3, 0.1], [0.4, 0.3, 0.3], 0.1334178),  # top 2 and a bucket for the tail
        ([0.6 / 0.9, 0.3 / 0.9], [0.4 / 0.7, 0.3 / 0.7], 0.0189956),  # top 2 renormalised
    ],
)
def test_forward_kl_is_of_the_teacher_to_the_student(
    teacher: list[float], student: list[float], expected: float
) -> None:
    assert float(forward_kl(log(student), log(teacher))) == pytest.approx(expected, abs=1e-7)
    assert float(exact_forward_kl(log(student), log(teacher))) == pytest.approx(expected, abs=5e-8)


def test_temperature_1_is_the_plain_softmax_and_higher_ones_are_softer() -> None:
    teacher, uniform = torch.tensor([[2.0, 1.0, 0.1]]), torch.zeros(1, 3)
    entropy = -sum(p * math.log(p) for p in (0.659, 0.242, 0.099))
    kls = [float(forward_kl(uniform, teacher, temperature)) for temperature in (1.0, 2.0, 4.0)]
    assert kls[0] == pytest.approx(math.log(3) - entropy, abs=1e-3)
    assert kls == sorted(kls, reverse=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_logits_lose_exactly_nothing(dtype: torch.dtype, temperature: float) -> None:
    same = logits(5, 50).to(dtype)
    assert forward_kl(same, same, temperature).tolist() == [0.0] * 5
    assert exact_forward_kl(same, same).tolist() == [0.0] * 5


def test_forward_kl_is_the_estimators_exact_kl() -> None:
    student, teacher = logits(20, 300, seed=1), logits(20, 300, seed=2)
    expected = exact_kl(teacher.numpy(), student.numpy())
    np.testing.assert_allclose(forward_kl(student, teacher).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(exact_forward_kl(student, teacher).numpy(), expected, rtol=1e-9)


def test_exact_forward_kl_keeps_its_digits_for_models_that_hardly_differ() -> None:
    teacher = logits(20, 300)
    student = teacher + 1e-3 * logits(20, 300, seed=1)
    expected = exact_kl(teacher.numpy(), student.numpy())
    actual = exact_forward_kl(student, teacher).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_mixes_soft_and_hard_loss(alpha: float) -> None:
    student, teacher, labels = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    sums = DistillationLoss(alpha, temperature=2.0)(student, teacher, labels)
    assert float(sums.soft) == pytest.approx(float(forward_kl(student, teacher, 2.0).sum()))
    cross_entropy = -student.log_softmax(-1)[torch.arange(6), labels].sum()
    assert float(sums.hard) == pytest.approx(float(cross_entropy))
    expected = alpha * 4 * float(sums.soft) + (1 - alpha) * float(sums.hard)
    assert float(sums.total) == pytest.approx(expected)
    assert sums.num_tokens == 6


def test_losses_are_sums_over_tokens() -> None:
    student, teacher, labels = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    loss = DistillationLoss()
    whole = loss(student, teacher, labels)
    parts = [loss(student[i : i + 2], teacher[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    assert float(whole.total) == pytest.approx(sum(float(part.total) for part in parts))


def test_bfloat16_logits_are_computed_in_float32() -> None:
    student, teacher = logits(6, 40).bfloat16(), logits(6, 40, seed=1).bfloat16()
    labels = torch.arange(6)
    rounded = DistillationLoss()(student, teacher, labels)
    exact = DistillationLoss()(student.float(), teacher.float(), labels)
    assert rounded.total.dtype == torch.float32
    assert float(rounded.total) == float(exact.total)


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = logits(3, 10).requires_grad_(), logits(3, 10, seed=1)
    sums = DistillationLoss()(student, teacher, torch.arange(3))
    sums.total.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert not sums.soft.requires_grad and not sums.hard.requires_grad


def test_gradient_of_the_soft_loss_is_t_times_the_difference_of_probabilities() -> None:
    """Hinton et al. 2015, equation 2: dKL/dz = (softmax(z/T) - softmax(v/T)) / T, here times T²."""
    student, teacher = logits(3, 10).requires_grad_(), logits(3, 10, seed=1)
    DistillationLoss(alpha=1.0, temperature=3.0)(student, teacher, torch.arange(3)).total.backward()
    expected = 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    torch.testing.assert_close(student.grad, expected.detach())
