from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from estimators.divergence import exact_kl
from export.run.errors import ExportError
from export.student.losses import (
    DistillationLoss,
    RandomTargets,
    SparseTargets,
    Targets,
    exact_logprobs,
    forward_kl,
    forward_kl_of_logprobs,
    jsd_of_logprobs,
)
from serve.text.real_tokens import RealTokens

TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3)
P, Q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
CACHED_TEACHER, CACHED_STUDENT = [0.6, 0.3, 0.07, 0.03], [0.4, 0.3, 0.2, 0.1]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


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


@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_forward_kl_is_the_estimators_and_the_exact_one_to_all_digits(distance: float) -> None:
    teacher = logits(20, 300)
    student = teacher + distance * logits(20, 300, seed=1)
    expected = exact_kl(teacher.numpy(), student.numpy())
    actual = forward_kl_of_logprobs(exact_logprobs(student), exact_logprobs(teacher)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(forward_kl(student, teacher).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_sum_over_tokens_of_soft_and_hard_in_shares_of_alpha(alpha: float) -> None:
    student, teacher, labels = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    sums = DistillationLoss(alpha, temperature=2.0)(student, teacher, labels)
    assert float(sums.soft) == pytest.approx(float(forward_kl(student, teacher, 2.0).sum()))
    cross_entropy = -student.log_softmax(-1)[torch.arange(6), labels].sum()
    assert float(sums.hard) == pytest.approx(float(cross_entropy))
    expected = alpha * 4 * float(sums.soft) + (1 - alpha) * float(sums.hard)
    assert float(sums.total) == pytest.approx(expected)
    assert sums.num_tokens == 6


def test_loss_of_bfloat16_logits_is_computed_in_float32() -> None:
    student, teacher = logits(6, 40).bfloat16(), logits(6, 40, seed=1).bfloat16()
    labels = torch.arange(6)
    rounded = DistillationLoss()(student, teacher, labels)
    exact = DistillationLoss()(student.float(), teacher.float(), labels)
    assert rounded.total.dtype == torch.float32
    assert float(rounded.total) == float(exact.total)


def test_gradient_of_the_soft_loss_is_t_times_the_difference_of_probabilities() -> None:
    """Hinton et al. 2015, equation 2: dKL/dz = (softmax(z/T) - softmax(v/T)) / T, here times T²."""
    student, teacher = logits(3, 10).requires_grad_(), logits(3, 10, seed=1)
    sums = DistillationLoss(alpha=1.0, temperature=3.0)(student, teacher, torch.arange(3))
    assert not sums.soft.requires_grad and not sums.hard.requires_grad
    sums.total.backward()
    expected = 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    torch.testing.assert_close(student.grad, expected.detach())


# --- the divergences


def soft_loss(divergence: str, **changes: Any) -> DistillationLoss:
    """Return the divergence alone, at T = 1."""
    return DistillationLoss(alpha=1.0, temperature=1.0, divergence=divergence, **changes)  # type: ignore[arg-type]


def soft_gradient(
    loss: DistillationLoss, student: torch.Tensor, teacher: Targets
) -> tuple[float, torch.Tensor]:
    """Return the loss and its gradient; the labels do not matter at alpha 1."""
    leaf = student.clone().requires_grad_()
    total = loss(leaf, teacher, torch.zeros(len(student), dtype=torch.long)).total
    total.backward()
    assert leaf.grad is not None
    return float(total.detach()), leaf.grad


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [("forward_kl", 0.6348972651), ("reverse_kl", 0.6758058950), ("jsd", 0.1513581116)],
)
def test_divergence_of_teacher_and_student_is_the_reference_value(
    divergence: str, expected: float
) -> None:
    sums = soft_loss(divergence)(log(Q), log(P), torch.tensor([0]))
    assert float(sums.total) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_weighted_kl_to_the_mixture_with_beta_on_the_teacher(beta: float) -> None:
    student, teacher = logits(20, 300, seed=1), logits(20, 300, seed=2)
    shares = ((beta, teacher.numpy()), (1 - beta, student.numpy()))
    mixture = np.log(sum(share * softmax(each, axis=-1) for share, each in shares))
    expected = sum(share * exact_kl(each, mixture) for share, each in shares)
    actual = jsd_of_logprobs(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)


def test_jsd_of_models_that_share_nothing_is_ln_2_with_a_finite_gradient() -> None:
    student, teacher = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])
    value, gradient = soft_gradient(soft_loss("jsd"), student, teacher)
    assert value == pytest.approx(math.log(2))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_the_teacher_itself_is_exactly_0(
    divergence: Any, temperature: float, dtype: torch.dtype
) -> None:
    same = logits(40, 50).to(dtype)
    loss = DistillationLoss(1.0, temperature, divergence, jsd_beta=0.3)
    value, gradient = soft_gradient(loss, same, same)
    assert value == 0.0
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_made_in_slices_is_that_of_plain_autograd(divergence: Any) -> None:
    student, teacher, labels = logits(37, 20), logits(37, 20, seed=1), torch.arange(37) % 20
    loss = DistillationLoss(0.3, 2.0, divergence, jsd_beta=0.2)
    plain, sliced = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = loss.sums(plain, teacher, labels)
    (expected[0] * 0.25).backward()
    actual = loss(sliced, teacher, labels)
    (actual.total * 0.25).backward()
    torch.testing.assert_close(sliced.grad, plain.grad)
    torch.testing.assert_close((actual.total, actual.soft, actual.hard), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_leaves_the_loss_in_float32(divergence: str) -> None:
    student, teacher, labels = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    loss = soft_loss(divergence)
    expected = loss(student, teacher, labels).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student, teacher, labels).total.equal(expected)


def test_loss_without_a_gradient_is_the_same() -> None:
    student, teacher = logits(3, 10).requires_grad_(), logits(3, 10, seed=1)
    expected = DistillationLoss()(student, teacher, torch.arange(3)).total.detach()
    with torch.inference_mode():
        total = DistillationLoss()(student, teacher, torch.arange(3)).total
    assert not total.requires_grad
    assert float(total) == float(expected)


def test_loss_of_no_tokens_is_0() -> None:
    none = torch.empty(0, 10)
    sums = DistillationLoss()(none.clone().requires_grad_(), none, torch.empty(0, dtype=torch.long))
    assert (float(sums.total.detach()), sums.num_tokens) == (0.0, 0)


# --- padded vocabularies


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_of_the_vocabulary_is_left_out_and_the_rest_renormalised(divergence: Any) -> None:
    student, teacher, labels = logits(5, 30), logits(5, 40, seed=1), torch.arange(5)
    expected = DistillationLoss(divergence=divergence)(student[:, :25], teacher[:, :25], labels)
    loss = DistillationLoss(divergence=divergence, real_tokens=RealTokens(25))
    actual = loss(student, teacher, labels)
    assert (float(actual.soft), float(actual.hard)) == (float(expected.soft), float(expected.hard))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "num_tokens", "missing"),
    [(320, 384, 300, (7, 250)), (151_936, 152_064, 151_665, ())],  # the latter Qwen2.5's
)
def test_loud_rows_without_tokens_change_neither_loss_nor_gradient(
    student_rows: int, teacher_rows: int, num_tokens: int, missing: Any, divergence: Any
) -> None:
    student, teacher, labels = logits(3, student_rows), logits(3, teacher_rows), torch.arange(3)
    loss = DistillationLoss(divergence=divergence, real_tokens=RealTokens(num_tokens, missing))
    quiet = loss(student.requires_grad_(), teacher, labels)
    quiet.total.backward()
    loud = student.detach().clone()
    for rows in (loud, teacher):
        rows[:, [*missing, *range(num_tokens, rows.shape[1])]] = 1e4
    sums = loss(loud.requires_grad_(), teacher, labels)
    sums.total.backward()
    assert (sums.total, sums.soft, sums.hard) == (quiet.total, quiet.soft, quiet.hard)
    assert loud.grad is not None and student.grad is not None
    assert loud.grad.equal(student.grad)
    assert loud.grad[:, [*missing, *range(num_tokens, student_rows)]].eq(0).all()


def test_vocabularies_of_two_sizes_are_refused_with_both_numbers() -> None:
    with pytest.raises(ExportError, match=r"30 columns, the teacher's 40: .*real_tokens"):
        DistillationLoss()(logits(5, 30), logits(5, 40), torch.arange(5))


# --- the likeliest k tokens and a tail bucket


def top_k(teacher: torch.Tensor, k: int) -> SparseTargets:
    logprobs, token_ids = teacher.float().log_softmax(-1).sort(descending=True)
    return SparseTargets(token_ids[:, :k], logprobs[:, :k], logprobs[:, k:].logsumexp(-1))


def without_tail(targets: SparseTargets) -> SparseTargets:
    return SparseTargets(targets.token_ids, targets.logprobs)


def test_tail_bucket_gives_the_reference_value_and_dropped_mass_a_wrong_one() -> None:
    student, targets = log(CACHED_STUDENT), top_k(log(CACHED_TEACHER), 2)
    loss, label = soft_loss("forward_kl"), torch.tensor([0])
    assert float(loss(student, targets, label).soft) == pytest.approx(0.1334178, abs=1e-7)
    dropped = loss(student, without_tail(targets), label)
    assert float(dropped.soft) == pytest.approx(0.2432791, abs=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_bucketed_divergence_lies_between_0_and_the_full_one(divergence: str, k: int) -> None:
    loss, label = soft_loss(divergence), torch.tensor([0])
    for seed in range(0, 20, 2):
        student, teacher = logits(1, 30, seed=seed), logits(1, 30, seed=seed + 1)
        bucketed = float(loss(student, top_k(teacher, k), label).soft)
        full = float(loss(student, teacher, label).soft)
        assert 0 <= bucketed <= full * (1 + 1e-6)


@pytest.mark.parametrize(
    ("divergence", "targets"),
    [
        *((divergence, top_k(logits(5, 30, seed=1), 29)) for divergence in DIVERGENCES),
        ("forward_kl", without_tail(top_k(logits(5, 30, seed=1), 30))),
    ],
)
def test_targets_of_every_token_give_the_full_divergence(
    divergence: str, targets: SparseTargets
) -> None:
    """A bucket of one token is that token."""
    student, loss = logits(5, 30), soft_loss(divergence)
    full = soft_gradient(loss, student, logits(5, 30, seed=1))
    # The bucket is 1 minus the sum of the others in float32: a few roundings of that sum.
    torch.testing.assert_close(soft_gradient(loss, student, targets), full, rtol=1e-5, atol=1e-5)


def test_tiny_tail_of_the_student_keeps_its_digits() -> None:
    """1 − Σ listed would be 0 in float32, and the loss infinite."""
    student, teacher = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    value, gradient = soft_gradient(soft_loss("forward_kl"), student, top_k(teacher, 1))
    p = float(teacher.softmax(-1)[0, 0])
    expected = p * math.log(p) + (1 - p) * (math.log(1 - p) - (math.log(2) - 40))
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()


# --- tokens drawn from the teacher


def test_random_sampling_is_unbiased_in_value_and_gradient() -> None:
    """The expectation over all 4³ draws, not an estimate of it."""
    teacher, student = log(CACHED_TEACHER).float(), log(CACHED_STUDENT).float()
    proposal = torch.tensor([0.4, 0.2, 0.2, 0.2])
    entropy = -(teacher.exp() * teacher).sum(-1)
    loss, mean, mean_gradient = soft_loss("forward_kl"), 0.0, torch.zeros_like(student)
    for draw in itertools.product(range(4), repeat=3):
        token_ids = torch.tensor([draw])
        weights = teacher.exp()[0, token_ids] / (3 * proposal[token_ids])
        value, gradient = soft_gradient(loss, student, RandomTargets(token_ids, weights, entropy))
        chance = float(proposal[token_ids].prod())
        mean += chance * value
        mean_gradient += chance * gradient
    full, full_gradient = soft_gradient(loss, student, teacher)
    assert mean == pytest.approx(full, abs=1e-6)
    torch.testing.assert_close(mean_gradient, full_gradient, rtol=1e-5, atol=1e-6)


# --- cached targets in general


def random_targets(num_rows: int) -> RandomTargets:
    token_ids = torch.arange(2 * num_rows).view(num_rows, 2)
    return RandomTargets(token_ids, torch.full((num_rows, 2), 0.5), torch.rand(num_rows))


@pytest.mark.parametrize("targets", [top_k(logits(5, 30), 3), random_targets(5)])
def test_cached_targets_at_another_temperature_are_refused(targets: Targets) -> None:
    with pytest.raises(ExportError, match=r"temperature 2.0 .* kind dense"):
        DistillationLoss(temperature=2.0)(logits(5, 30), targets, torch.arange(5))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("targets", [without_tail(top_k(logits(5, 30), 3)), random_targets(5)])
def test_other_divergences_without_a_tail_are_refused(divergence: str, targets: Targets) -> None:
    with pytest.raises(ExportError, match=rf"divergence '{divergence}' .* choose forward_kl"):
        soft_loss(divergence)(logits(5, 30), targets, torch.arange(5))


@pytest.mark.parametrize(
    "targets",
    [top_k(logits(37, 80), 3), without_tail(top_k(logits(37, 80), 3)), random_targets(37)],
)
def test_slices_of_cached_targets_add_up_to_the_whole(
    targets: SparseTargets | RandomTargets,
) -> None:
    student, labels = logits(37, 80, seed=1), torch.arange(37)
    loss = DistillationLoss(temperature=1.0)
    whole = loss(student, targets, labels)
    parts = [
        loss(s, t, y)
        for s, t, y in zip(student.split(10), targets.split(10), labels.split(10), strict=True)
    ]
    assert [part.num_tokens for part in parts] == [10, 10, 10, 7]
    assert float(whole.total) == pytest.approx(sum(float(p.total) for p in parts), rel=1e-6)
    again = type(targets).concatenate(targets.split(10)).to(torch.device("cpu"))
    assert float(loss(student, again, labels).total) == float(whole.total)
