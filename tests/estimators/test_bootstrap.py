from statistics import NormalDist

import numpy as np
import pytest

from estimators.bootstrap import (
    Resampling,
    bootstrap_mean,
    bootstrap_mean_difference,
    bootstrap_ratio,
    bootstrap_ratio_difference,
)
from estimators.estimate import Estimate, Interval

PERCENTILE = Resampling(method="percentile")


def normal_values(num_values, seed=0):
    return np.random.default_rng(seed).normal(3.0, 2.0, num_values)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_normal_mean_has_its_closed_form(method, confidence):
    values = normal_values(400)
    interval = bootstrap_mean(values, Resampling(10_000, confidence, method)).interval
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.06 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.06 * half_width)


def test_two_clusters_have_the_three_means_of_their_resamples():
    """Resamples of (0, 1) have the mean 0, ½ or 1, with the chances ¼, ½ and ¼."""
    assert bootstrap_mean([0.0, 1.0], PERCENTILE).interval == Interval(0.0, 1.0)
    narrow = Resampling(confidence=0.4, method="percentile")
    assert bootstrap_mean([0.0, 1.0], narrow).interval == Interval(0.5, 0.5)


def test_bca_leans_towards_the_long_tail():
    """For positive skew both ends move up: DiCiccio & Efron (1996), section 2."""
    values = np.random.default_rng(0).exponential(size=40)
    bca, percentile = (bootstrap_mean(values, r).interval for r in (Resampling(), PERCENTILE))
    assert bca.low > percentile.low
    assert bca.high > percentile.high


def test_bca_levels_of_a_skewed_sample():
    """Bias and acceleration by hand, from the same resamples: E&T eq. 14.10, 14.14 and 14.15."""
    values = np.random.default_rng(1).exponential(size=12)
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=2000)
    means = counts @ values / 12
    normal = NormalDist()
    z0 = normal.inv_cdf((means < values.mean()).mean())
    left_out = np.array([np.delete(values, i).mean() for i in range(12)])
    d = left_out.mean() - left_out
    a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    levels = [
        normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in map(normal.inv_cdf, (0.025, 0.975))
    ]
    interval = bootstrap_mean(values).interval
    expected = np.quantile(means, levels)
    assert [interval.low, interval.high] == pytest.approx(expected, abs=1e-3)


def test_ratio_weighs_clusters_by_their_size():
    estimate = bootstrap_ratio([1.0, 30.0], [10, 100])
    assert estimate.value == pytest.approx(31 / 110)
    assert estimate.interval == Interval(0.1, 0.3)


def test_ratio_of_equal_sizes_is_the_mean():
    values = normal_values(30)
    ratio, mean = bootstrap_ratio(values * 7, np.full(30, 7)), bootstrap_mean(values)
    assert ratio.value == pytest.approx(mean.value)
    assert ratio.interval.low == pytest.approx(mean.interval.low)
    assert ratio.interval.high == pytest.approx(mean.interval.high)


def test_pairing_takes_the_prompts_out_of_the_difference():
    prompts, noise = normal_values(50), 0.01 * normal_values(50, seed=1)
    difference = bootstrap_mean_difference(prompts, prompts + 0.1 + noise)
    assert difference.value == pytest.approx(0.1 + noise.mean())
    assert difference.interval.excludes(0)
    assert bootstrap_mean(prompts).interval.high - prompts.mean() > 0.3


def test_ratio_difference_is_b_minus_a_on_the_same_prompts():
    sizes = np.arange(1, 51)
    a = normal_values(50) * sizes
    difference = bootstrap_ratio_difference(a, sizes, 1.1 * a, sizes)
    assert difference.value == pytest.approx(0.1 * a.sum() / sizes.sum())
    scaled = bootstrap_ratio(0.1 * a, sizes).interval
    assert difference.interval.low == pytest.approx(scaled.low)
    assert difference.interval.high == pytest.approx(scaled.high)


@pytest.mark.parametrize("values", [[0.4], [0.0, 0.0, 0.0]])
def test_without_spread_there_is_no_interval(values):
    assert bootstrap_mean(values) == Estimate(values[0], n=len(values))


def test_difference_from_itself_is_zero_without_interval():
    a, sizes = normal_values(9), np.arange(1, 10)
    assert bootstrap_mean_difference(a, a) == Estimate(0.0, n=len(a))
    assert bootstrap_ratio_difference(a, sizes, a, sizes) == Estimate(0.0, n=len(a))


def test_one_ratio_in_clusters_of_all_sizes_is_no_spread():
    sizes = np.arange(1, 30)
    assert bootstrap_ratio(sizes * 0.1, sizes).interval is None


def test_same_seed_same_interval_and_another_seed_another_one():
    values = normal_values(20)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, Resampling(seed=1))


def test_interval_excludes_what_lies_outside():
    interval = Interval(-1.0, 2.0)
    assert [interval.excludes(x) for x in (-1.1, -1.0, 0.0, 2.0, 2.1)] == [
        True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_value_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        bootstrap_mean([1.0, bad])


def test_no_clusters_are_refused():
    with pytest.raises(ValueError, match="no clusters"):
        bootstrap_ratio([], [])


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_unequal_lengths_are_refused(first, second):
    with pytest.raises(ValueError, match="one value per cluster"):
        bootstrap_ratio(first, second)


@pytest.mark.parametrize("denominators", [[1.0, 0.0], [1.0, -2.0]])
def test_denominator_that_is_not_positive_is_refused(denominators):
    with pytest.raises(ValueError, match="denominators"):
        bootstrap_ratio([1.0, 2.0], denominators)
    with pytest.raises(ValueError, match="denominators"):
        bootstrap_ratio_difference([1.0, 2.0], [1, 1], [1.0, 2.0], denominators)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"num_resamples": 0}, "num_resamples = 0"), ({"confidence": 1.0}, "confidence = 1.0")],
)
def test_options_out_of_bounds_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Resampling(**option)
