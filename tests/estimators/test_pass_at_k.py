from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimators.pass_at_k import pass_at_k


def exact_pass_at_k(n, c, k):
    """The slow obvious version: whole binomials, one correctly rounded division."""
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


@st.composite
def counts(draw, max_samples=200):
    n = draw(st.integers(1, max_samples))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (8, 1, 1, 0.125),
        (8, 1, 4, 0.5),
        (8, 3, 4, 0.9285714286),
        (16, 4, 8, 0.9615384615),
        (64, 3, 10, 0.4046658986),
        (10, 0, 5, 0.0),
        (8, 8, 1, 1.0),
        (8, 1, 8, 1.0),
        (1, 0, 1, 0.0),
    ],
)
def test_reference_values(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=5e-11)


@given(counts())
def test_equals_the_ratio_of_whole_binomials(n_c_k):
    assert pass_at_k(*n_c_k) == pytest.approx(exact_pass_at_k(*n_c_k), rel=1e-12)


@pytest.mark.parametrize(("c", "k"), [(1, 1), (1, 9_999), (3, 100), (5_000, 3), (9_999, 1)])
def test_ten_thousand_samples_neither_overflow_nor_lose_precision(c, k):
    assert pass_at_k(10_000, c, k) == pytest.approx(exact_pass_at_k(10_000, c, k), rel=1e-12)


def test_is_not_resampling_with_replacement():
    with_replacement = 1 - (1 - 1 / 8) ** 4
    assert with_replacement == pytest.approx(0.4138, abs=5e-5)
    assert pass_at_k(8, 1, 4) == 0.5


def test_is_unbiased_over_binomial_counts():
    n, k, p = 12, 4, 0.3
    c = np.arange(n + 1)
    weights = [comb(n, i) * p**i * (1 - p) ** (n - i) for i in c]
    assert pass_at_k(n, c, k) @ weights == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@given(counts())
def test_grows_with_k_and_with_c_and_stays_a_probability(n_c_k):
    n, c, k = n_c_k
    estimate = pass_at_k(n, c, k)
    assert 0.0 <= estimate <= 1.0
    assert estimate <= pass_at_k(n, c, min(k + 1, n)) + 1e-15
    assert estimate <= pass_at_k(n, min(c + 1, n), k) + 1e-15


def test_pass_at_1_is_the_fraction_correct():
    np.testing.assert_allclose(pass_at_k(10, np.arange(11), 1), np.arange(11) / 10, rtol=1e-15)


def test_arrays_broadcast_and_scalars_give_a_float():
    estimates = pass_at_k([[8], [16]], [1, 2, 3], 4)
    assert estimates.shape == (2, 3)
    assert estimates[1, 2] == pass_at_k(16, 3, 4)
    assert type(pass_at_k(np.int64(8), 1, 4)) is float
    assert pass_at_k(np.zeros(0, int), 0, 1).shape == (0,)


@pytest.mark.parametrize("c", [0, 1, 8])
def test_k_above_n_is_refused_also_without_a_correct_sample(c):
    with pytest.raises(ValueError, match=r"k = 9 with num_samples = 8: k must be 1 to num_samples"):
        pass_at_k(8, c, 9)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (8, 1, 0, r"k = 0 .* must be 1 to num_samples"),
        (8, 1, -1, r"k = -1 .* must be 1 to num_samples"),
        (0, 0, 1, r"k = 1 with num_samples = 0"),
        (8, 9, 1, r"num_correct = 9 .* must be 0 to num_samples"),
        (8, -1, 1, r"num_correct = -1 .* must be 0 to num_samples"),
        (-1, 0, 1, r"num_samples = -1: it must not be negative"),
        ([8, 4], [1, 1], 5, r"k = 5 with num_samples = 4"),
        (8.0, 1, 1, r"num_samples = 8\.0: it must be an integer"),
        (8, float("nan"), 1, r"num_correct = nan: it must be an integer"),
        (8, 1, True, r"k = True: it must be an integer"),
    ],
)
def test_counts_out_of_bounds_are_refused_by_name(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)
