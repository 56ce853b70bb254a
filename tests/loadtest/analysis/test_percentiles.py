"""Percentiles and their intervals, against hand arithmetic and resamples written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from estimators.estimate import Estimate
from loadtest.analysis.percentiles import (
    Clustered,
    distribution,
    log_histogram,
    percentile,
    quantile_estimate,
    quantile_ratio,
)


def each_its_own(values: list[float]) -> Clustered:
    return Clustered(values, range(len(values)))


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(
    ("percent", "expected"),
    # Position (n − 1) q of 0.1, ..., 1.0: 4.5, 8.1, 8.55.
    [(50, 0.55), (90, 0.91), (95, 0.955), (0, 0.1), (100, 1.0)],
)
def test_percentiles_interpolate_between_ranks(percent: float, expected: float) -> None:
    values = [0.3, 0.1, 0.2, 0.6, 0.5, 0.4, 0.9, 0.8, 0.7, 1.0]
    assert percentile(values, percent) == pytest.approx(expected)


def test_distribution_has_a_percentile_where_a_value_is_expected_above_it() -> None:
    found = distribution(each_its_own([float(i) for i in range(20)]))
    assert (found.count, found.mean) == (20, 9.5)
    assert found.p95 is not None and found.p95.value == pytest.approx(18.05)
    assert found.p99 is None
    assert distribution(each_its_own([0.0] * 99)).p99 is None
    assert distribution(each_its_own([0.0] * 100)).p99 is not None


def test_distribution_of_nothing_is_empty() -> None:
    found = distribution(each_its_own([]))
    assert (found.count, found.mean, found.p50) == (0, None, None)


def slow_quantile_interval(data: Clustered, quantile: float) -> tuple[float, float]:
    """Write every resample out; the same draws as the fast version."""
    clusters = list(dict.fromkeys(data.clusters))
    rng = np.random.default_rng(0)
    shares = np.full(len(clusters), 1 / len(clusters))
    replicates = []
    for draw in rng.multinomial(len(clusters), shares, size=1000):
        times = dict(zip(clusters, draw, strict=True))
        repeats = [times[cluster] for cluster in data.clusters]
        replicates.append(np.quantile(np.repeat(data.values, repeats), quantile))
    low, high = np.quantile(replicates, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_quantile_interval_equals_that_of_resamples_written_out(quantile: float) -> None:
    rng = np.random.default_rng(3)
    data = Clustered(rng.exponential(size=60).tolist(), rng.integers(0, 15, size=60).tolist())
    found = quantile_estimate(data, quantile)
    assert (found.low, found.high) == pytest.approx(slow_quantile_interval(data, quantile))
    assert found.n == 60


def test_quantile_interval_of_many_values_is_as_good_as_exact() -> None:
    rng = np.random.default_rng(4)
    data = Clustered(rng.exponential(size=9000).tolist(), np.repeat(range(30), 300).tolist())
    found = quantile_estimate(data, 0.95)
    assert (found.low, found.high) == pytest.approx(slow_quantile_interval(data, 0.95), rel=2e-3)
    assert found.value == np.quantile(data.values, 0.95)


def test_alike_values_of_one_cluster_widen_the_interval() -> None:
    values = np.repeat(np.random.default_rng(5).normal(10, 1, size=20), 10).tolist()
    apart = quantile_estimate(each_its_own(values), 0.5)
    together = quantile_estimate(Clustered(values, np.repeat(range(20), 10).tolist()), 0.5)
    widths = [e.high - e.low for e in (apart, together) if e.high is not None and e.low is not None]
    assert widths[1] > 2 * widths[0]


def test_one_cluster_has_no_interval() -> None:
    found = quantile_estimate(Clustered([1.0, 2.0, 3.0], ["p"] * 3), 0.5)
    assert found == Estimate(2.0, None, None, 3)


def test_quantile_intervals_cover_as_often_as_they_say() -> None:
    """200 simulations of 40 prompts with 3 requests each; the median of the mixture is 1."""
    rng = np.random.default_rng(6)
    clusters = np.repeat(range(40), 3).tolist()
    hits = 0
    for _ in range(200):
        prompts = np.repeat(rng.normal(0, 0.5, size=40), 3)
        values = np.exp(prompts + rng.normal(0, 0.5, size=120)).tolist()
        hits += covers(quantile_estimate(Clustered(values, clusters), 0.5), 1.0)
    assert 0.90 <= hits / 200 <= 0.99


def test_ratio_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        length = np.exp(rng.normal(0, 0.3, size=60))
        fast = length * np.exp(rng.normal(0, 0.3, size=60))
        slow = 3 * length * np.exp(rng.normal(0, 0.3, size=60))
        found = quantile_ratio(each_its_own(slow.tolist()), each_its_own(fast.tolist()), 0.5)
        assert found is not None
        hits += covers(found, 3.0)
    assert 0.90 <= hits / 200 <= 0.99


def test_paired_ratio_is_exact_where_every_pair_has_it() -> None:
    """Prompts of all lengths, always 3 times: only resampling both sides alike sees it."""
    lengths = np.exp(np.random.default_rng(8).normal(0, 2, size=30))
    found = quantile_ratio(
        each_its_own((3 * lengths).tolist()), each_its_own(lengths.tolist()), 0.5
    )
    assert found is not None and found.value == pytest.approx(3.0) and found.n == 30
    assert found.low is None or (found.low, found.high) == pytest.approx((3.0, 3.0))


def test_ratio_uses_clusters_of_both_sides_alone() -> None:
    slow = Clustered([4.0, 6.0, 1e9], ["a", "b", "only here"])
    fast = Clustered([3.0, 2.0, 1e-9], ["b", "a", "only there"])
    found = quantile_ratio(slow, fast, 0.5)
    assert found is not None and (found.value, found.n) == (2.0, 2)


def test_ratio_needs_common_clusters_enough_values_and_a_denominator() -> None:
    assert quantile_ratio(Clustered([1.0] * 2, "aa"), Clustered([1.0] * 2, "bb"), 0.5) is None
    assert quantile_ratio(each_its_own([1.0] * 9), each_its_own([1.0] * 9), 0.9) is None
    assert quantile_ratio(each_its_own([1.0] * 9), each_its_own([0.0] * 9), 0.5) is None


def test_ratio_has_no_interval_where_a_resample_divides_by_zero() -> None:
    found = quantile_ratio(each_its_own([2.0] * 5), each_its_own([0.0, 0.0, 1.0, 1.0, 1.0]), 0.5)
    assert found == Estimate(2.0, None, None, 5)


def test_histogram_is_logarithmic_and_loses_nothing() -> None:
    values = [0.0, 0.0005, 0.001, 0.0011, 0.0101, 0.1]
    found = log_histogram(values, 0.001)
    assert found is not None
    assert found.edges[:2] == (0.0, 0.001) and found.edges[11] == pytest.approx(0.01)
    assert found.counts[0] == 2 and found.counts[1] == 2 and found.counts[11] == 1
    assert sum(found.counts) == len(values) and len(found.edges) == len(found.counts) + 1
    assert log_histogram([], 0.001) is None


@pytest.mark.parametrize("exponent", range(-6, 7))
def test_histogram_holds_values_on_its_last_edge(exponent: int) -> None:
    found = log_histogram([10.0**exponent, math.nextafter(10.0**exponent, 0)], 1e-6)
    assert found is not None and sum(found.counts) == 2
