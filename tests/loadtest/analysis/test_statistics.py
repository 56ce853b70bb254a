"""Shares, tests and paired intervals, against hand arithmetic and simulations."""

from __future__ import annotations

import numpy as np
import pytest

from estimators.estimate import Estimate
from loadtest.analysis.statistics import (
    clustered_difference,
    clustered_ratio,
    clustered_share,
    mcnemar_p,
    ratio_of_ratios,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # z² = 3.8415: 0 of 10 is [0, z² / (10 + z²)]; 5 of 10 is 0.5 ± z √(2.5 + z²/4) / (10 + z²).
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0)],
)
def test_wilson_by_hand(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert (found.value, found.n) == (successes / trials, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_what_is_no_share(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=r"must|integer"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    # 1 of 6: 2 (1 + 6) / 64. 0 of 5: 2 / 32. As many either way: 1. None at all: 1.
    [(1, 5, 0.21875), (5, 1, 0.21875), (0, 5, 0.0625), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, expected: float) -> None:
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected)


def test_mcnemar_of_thousands_of_pairs_is_a_number() -> None:
    assert mcnemar_p(2000, 2100) == pytest.approx(0.122, abs=1e-3)


def test_clustered_ratio_is_of_sums() -> None:
    found = clustered_ratio([1.0, 3.0, 2.0], [10.0, 10.0, 20.0], ["a", "a", "b"])
    assert (found.value, found.n) == (0.15, 40)
    assert found.low is not None and found.low >= 0.1 and found.high is not None
    assert found.high <= 0.2


def test_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no clusters"):
        clustered_ratio([], [], [])
    with pytest.raises(ValueError, match="they must be positive"):
        clustered_ratio([1.0], [0.0], ["a"])


def test_share_that_is_everywhere_the_same_still_has_an_interval() -> None:
    """20 prompts, each right twice, are 20 successes and not certainty."""
    found = clustered_share([1.0] * 40, np.repeat(range(20), 2).tolist())
    exact = wilson(20, 20)
    assert found == Estimate(1.0, exact.low, 1.0, 40)
    assert clustered_share([0.0] * 3, [0, 1, 2]) == wilson(0, 3)


def test_ratio_of_ratios_by_hand() -> None:
    found = ratio_of_ratios(([10.0, 20.0], [1.0, 1.0]), ([4.0, 6.0], [1.0, 1.0]), ["a", "b"])
    assert (found.value, found.n) == (3.0, 2)
    assert (found.low, found.high) == pytest.approx((2.5, 20 / 6))


def test_difference_is_paired() -> None:
    """Prompts differ by far more than the arms do: apart, no interval would exclude 0."""
    b = [0.0, 0.1, 0.5, 0.7, 0.2, 0.4, 0.8, 0.3]
    a = [value + step for value, step in zip(b, [0.1, 0.12] * 4, strict=True)]
    found = clustered_difference(a, b, range(8))
    assert found.value == pytest.approx(0.11) and found.n == 8
    assert found.low is not None and 0.1 <= found.low < 0.11


def test_difference_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(9)
    prompts = np.repeat(range(40), 3).tolist()
    hits = 0
    for _ in range(200):
        hard = rng.uniform(size=(2, 40)).repeat(3, axis=1)
        a, b = (rng.uniform(size=(2, 120)) < hard).astype(float).tolist()
        found = clustered_difference(a, b, prompts)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 200 <= 0.99
