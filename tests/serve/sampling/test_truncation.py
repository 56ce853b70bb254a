"""Top-k, top-p and min-p against a walk down the ranks of one row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.sampling import truncation
from serve.sampling.params import SamplingParams
from serve.sampling.truncation import Filters, draw_truncated

SETTINGS = st.builds(
    SamplingParams,
    top_k=st.integers(0, 60),
    top_p=st.integers(1, 16).map(lambda n: n / 16),
    min_p=st.integers(0, 8).map(lambda n: n / 8),
)
WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=50).filter(any)


def slow_kept(weights: list[int], params: SamplingParams) -> list[int]:
    """Walk from the heaviest token down; of equal ones the lower id comes first."""
    kept, mass = [], 0
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    for rank, token in enumerate(order):
        is_in_top_k = params.top_k == 0 or rank < params.top_k
        is_in_top_p = params.top_p == 1.0 or mass < params.top_p * sum(weights)
        if is_in_top_k and is_in_top_p and weights[token] >= params.min_p * max(weights):
            kept.append(token)
        mass += weights[token]
    return kept


def draw(
    weights: torch.Tensor, params: list[SamplingParams], u: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    totals = weights.double().sum(-1, keepdim=True)
    filters = Filters.of(params, weights.device)
    return draw_truncated(weights, totals, filters, u[:, None], **settings)


@given(WEIGHTS, SETTINGS, st.sampled_from([1, 2, 7, 1025]))
def test_sweep_over_u_draws_what_a_walk_down_the_ranks_keeps(
    weights: list[int], params: SamplingParams, num_ranked: int
) -> None:
    """In the order of the walk, each token as often as it weighs, however few are ranked first."""
    expected = [t for t in slow_kept(weights, params) for _ in range(weights[t])]
    mass = len(expected)
    u = (torch.arange(mass, dtype=torch.float64) + 0.5) / mass
    rows = torch.tensor(weights).float().expand(mass, -1)
    token_ids, logprobs = draw(rows, [params] * mass, u, num_ranked=num_ranked)
    assert token_ids.tolist() == expected
    assert logprobs.tolist() == pytest.approx([math.log(weights[t] / mass) for t in expected])


@given(WEIGHTS, SETTINGS, st.floats(0, 1, exclude_max=True))
def test_sorting_everything_draws_the_same_as_selecting(
    weights: list[int], params: SamplingParams, u: float
) -> None:
    """CUDA sorts, the CPU selects; `Ranked.sort` runs on both."""
    rows = torch.tensor([weights]).float()
    ranked = truncation.Ranked.sort(rows)
    num_kept = Filters.of([params], rows.device).num_kept(ranked, rows.double().sum(-1)[:, None])
    uniform = torch.tensor([u], dtype=torch.float64)
    sorted_draw = ranked.draw(rows, num_kept, uniform[:, None])
    assert sorted_draw == draw(rows, [params], uniform)


def test_rows_with_different_filters_draw_the_same_alone_and_together() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(4 * torch.randn(6, 3000, generator=generator), -1)
    u = torch.rand(6, dtype=torch.float64, generator=generator)
    params = [
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=50),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=2000),
        SamplingParams(top_p=0.5, top_k=20, min_p=0.01),
        SamplingParams(top_p=0.999999),
    ]
    together = draw(weights, params, u)
    for row in range(6):
        alone = draw(weights[row : row + 1], params[row : row + 1], u[row : row + 1])
        assert [x.item() for x in alone] == [x[row].item() for x in together]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_token_of_weight_zero_is_never_drawn_though_top_k_keeps_it(u: float) -> None:
    weights = torch.tensor([[0.0, 1e-30, 0.0, 3e-30, 0.0]])
    token_ids, logprobs = draw(
        weights, [SamplingParams(top_k=4)], torch.tensor([u], dtype=torch.float64)
    )
    assert token_ids.item() == (1 if u > 0.75 else 3)
    assert logprobs.item() == pytest.approx(math.log(0.25 if u > 0.75 else 0.75))


def test_row_of_nan_gives_some_token_and_leaves_its_neighbours_alone() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [math.nan] * 3, [0.1, 0.1, 0.8]])
    u = torch.full((3,), 0.9, dtype=torch.float64)
    token_ids, logprobs = draw(weights, [SamplingParams(top_k=2)] * 3, u, num_ranked=1)
    assert 0 <= token_ids[1] < 3
    assert token_ids[[0, 2]].tolist() == [1, 0]
    assert logprobs.isnan().tolist() == [False, True, False]
