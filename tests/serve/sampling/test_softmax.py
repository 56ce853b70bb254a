"""Inverse CDF and argmax by blocks against a walk along the row."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.sampling import softmax

# One block, several, and several with a rest.
VOCAB_SIZES = (40, 256, 1024, 1000)


def inverse_cdf(weights: torch.Tensor, u: torch.Tensor) -> list[int]:
    tokens: list[int] = softmax.inverse_cdf(weights, softmax.block_sums_of(weights), u).tolist()
    return tokens


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_sweep_over_u_draws_every_token_exactly_as_often_as_it_weighs(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(0, 3, (vocab_size,), generator=generator)
    total = int(weights.sum())
    u = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    tokens = inverse_cdf(weights.float().expand(total, -1), u)
    assert tokens == sorted(tokens)
    assert torch.equal(torch.tensor(tokens).bincount(minlength=vocab_size), weights)


@given(st.data())
def test_inverse_cdf_is_a_walk_along_the_cumulative_weights(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=600).filter(any))
    u = data.draw(st.floats(0, 1, exclude_max=True))
    (token,) = inverse_cdf(torch.tensor([weights]).float(), torch.tensor([u], dtype=torch.float64))
    cumulative = itertools.accumulate(weights)
    assert token == next(i for i, c in enumerate(cumulative) if c > u * sum(weights))


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize("only", [0, 255, 256, 700, 999])
def test_token_of_weight_zero_is_never_drawn(only: int, u: float) -> None:
    weights = torch.zeros(1, 1000)
    weights[0, only] = 1e-30
    assert inverse_cdf(weights, torch.tensor([u], dtype=torch.float64)) == [only]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_largest_uniform_draws_a_token_that_has_weight(vocab_size: int) -> None:
    weights = torch.rand(64, vocab_size, generator=torch.Generator().manual_seed(3))
    weights[:, -20:] = 0.0
    tokens = inverse_cdf(weights, torch.full((64,), 1 - 2**-53, dtype=torch.float64))
    assert set(tokens) == {vocab_size - 21}
