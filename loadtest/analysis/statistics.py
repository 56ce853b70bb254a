"""Shares, means and ratios with 95 % intervals.

Requests of one prompt are alike, so intervals resample prompts (clusters) whole: means and ratios
by `estimators.bootstrap`; what it has not is here. Quantiles: `percentiles`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from estimators import bootstrap
from estimators.estimate import Estimate

Array = NDArray[np.float64]

_LEVELS = (0.025, 0.975)
_NUM_RESAMPLES = 1000
_SEED = 0


def wilson(num_successes: int, num_trials: int) -> Estimate:
    """Return a share with its Wilson score interval.

    Raises:
        ValueError: unless 0 ≤ num_successes ≤ num_trials and num_trials ≥ 1.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).

    >>> estimate = wilson(8, 10)
    >>> round(estimate.low, 3), round(estimate.high, 3)
    (0.49, 0.943)
    """
    from scipy.stats import binomtest  # which takes half a second to import

    found = binomtest(num_successes, num_trials).proportion_ci(method="wilson")
    return Estimate(num_successes / num_trials, float(found.low), float(found.high), num_trials)


def mcnemar_p(num_only_a: int, num_only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test: that discordant pairs fall either way alike.

    Args:
        num_only_a, num_only_b: pairs where only a, only b, is right.

    Raises:
        ValueError: for negative counts.

    Source: McNemar (1947); the binomial form of Fay, "Two-sided exact tests and matching
    confidence intervals for discrete data" (2010).

    >>> round(mcnemar_p(1, 5), 5), mcnemar_p(0, 0)
    (0.21875, 1.0)
    """
    from scipy.stats import binomtest

    num_discordant = num_only_a + num_only_b
    return float(binomtest(num_only_a, num_discordant).pvalue) if num_discordant else 1.0


def clustered_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    resampling: bootstrap.Resampling = bootstrap.DEFAULT,
) -> Estimate:
    """Return Σ numerators / Σ denominators with its BCa interval; `n` is Σ denominators.

    Raises:
        ValueError: no values, or a cluster whose denominators add up to 0 or less.
    """
    above, below = sums(numerators, clusters), sums(denominators, clusters)
    found = bootstrap.bootstrap_ratio(above, below, resampling)
    return replace(found, n=round(below.sum()))


def clustered_share(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of values between 0 and 1.

    Where all are 0, or all 1, no resample differs: the interval is Wilson's of as many trials as
    clusters.
    """
    found = clustered_ratio(values, [1.0] * len(values), clusters)
    if found.value not in (0.0, 1.0):
        return found
    num_clusters = len(set(clusters))
    exact = wilson(round(found.value) * num_clusters, num_clusters)
    return Estimate(found.value, exact.low, exact.high, found.n)


def clustered_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]
) -> Estimate:
    """Return mean(a) − mean(b) of pairs, `(N,)` each, with its BCa interval."""
    return clustered_ratio(np.subtract(a, b).tolist(), [1.0] * len(a), clusters)


def ratio_of_ratios(
    above: tuple[Sequence[float], Sequence[float]],
    below: tuple[Sequence[float], Sequence[float]],
    clusters: Sequence[Hashable],
) -> Estimate:
    """Return one ratio of sums over another's, both of the same pairs, as (Σ, Σ) columns.

    `n` counts the clusters. All columns must be positive.
    """
    columns = np.stack([sums(column, clusters) for column in (*above, *below)], axis=1)
    totals = np.vstack([columns.sum(axis=0), draws(len(columns)) @ columns])
    ratios = totals[:, 0] / totals[:, 1] / (totals[:, 2] / totals[:, 3])
    return percentile_interval(float(ratios[0]), ratios[1:], len(columns))


def number_clusters(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return a number from 0 for each value's cluster, in order of their first appearance."""
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[cluster] for cluster in clusters], dtype=np.int64)


def sums(values: Sequence[float], clusters: Sequence[Hashable]) -> Array:
    """Return the sum of each cluster, in order of their first appearance."""
    numbers = number_clusters(clusters)
    totals = np.zeros(int(numbers.max(initial=-1)) + 1)
    np.add.at(totals, numbers, np.asarray(values, dtype=np.float64))
    return totals


@functools.lru_cache(maxsize=4)
def draws(num_clusters: int) -> Array:
    """Return how often each resample has each cluster, `(R, C)`: the same at every call."""
    shares = np.full(num_clusters, 1 / num_clusters)
    rng = np.random.default_rng(_SEED)
    numbers = rng.multinomial(num_clusters, shares, size=_NUM_RESAMPLES)
    counts = np.asarray(numbers, dtype=np.float64)
    counts.flags.writeable = False
    return counts


def percentile_interval(value: float, replicates: Array, n: int) -> Estimate:
    """Return an estimate with the interval that its replicates span; None where they all agree.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), 13.3.
    """
    if not np.isfinite(replicates).all() or np.ptp(replicates) <= 1e-12 * abs(value):
        return Estimate(value, None, None, n)
    low, high = np.quantile(replicates, _LEVELS)
    return Estimate(value, float(low), float(high), n)
