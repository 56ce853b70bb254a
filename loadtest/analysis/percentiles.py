"""Quantiles of latencies with 95 % intervals that resample prompts whole, and histograms."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from estimators.estimate import Estimate
from loadtest.analysis.statistics import Array, draws, number_clusters, percentile_interval
from loadtest.analysis.summary import Distribution, Histogram

PERCENTILES = (50, 90, 95, 99)

# Intervals are found among this many order statistics at most; the value itself is always exact.
_MAX_STEPS = 4096
_BINS_PER_DECADE = 10


@dataclass(frozen=True, slots=True)
class Clustered:
    """Values `(N,)` and for each the cluster it belongs to."""

    values: Sequence[float]
    clusters: Sequence[Hashable]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation, numpy's default (Hyndman & Fan's type 7).

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50), percentile([1.0, 2.0, 3.0, 4.0], 90)
    (2.5, 3.7)
    """
    return float(np.quantile(np.asarray(values, dtype=np.float64), percent / 100))


def is_enough(count: int, percent: float) -> bool:
    """Return whether a value is expected above the percentile.

    p99 of 99 values is little else than their maximum.
    """
    return count * (100 - percent) >= 100


def distribution(data: Clustered) -> Distribution:
    """Return count, mean, and those percentiles for which values are enough."""
    count = len(data.values)
    estimates = [
        quantile_estimate(data, percent / 100) if is_enough(count, percent) else None
        for percent in PERCENTILES
    ]
    return Distribution(count, float(np.mean(data.values)) if count else None, *estimates)


def quantile_estimate(data: Clustered, quantile: float) -> Estimate:
    """Return a type 7 quantile with its percentile bootstrap interval, clusters resampled.

    Not BCa: its jackknife is not consistent for quantiles.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), 11.6 and 13.3.
    """
    replicates = _replicates(data, number_clusters(data.clusters), quantile)
    value = percentile(data.values, 100 * quantile)
    return percentile_interval(value, replicates, len(data.values))


def quantile_ratio(
    numerator: Clustered, denominator: Clustered, quantile: float
) -> Estimate | None:
    """Return one sample's quantile over another's; each resample draws the same clusters of both.

    Clusters that one side lacks are left out. `n` counts the clusters. None: no common cluster, too
    few values in them (`is_enough`), or a denominator of 0.
    """
    common = set(numerator.clusters) & set(denominator.clusters)
    above, below = _only(numerator, common), _only(denominator, common)
    if not is_enough(min(len(above.values), len(below.values)), 100 * quantile):
        return None
    bottom = percentile(below.values, 100 * quantile)
    if bottom <= 0:
        return None
    labels = number_clusters([*above.clusters, *below.clusters])
    tops = _replicates(above, labels[: len(above.values)], quantile)
    bottoms = _replicates(below, labels[len(above.values) :], quantile)
    # A resample whose denominator is 0 has no ratio: the interval would have no upper end.
    replicates = tops / bottoms if (bottoms > 0).all() else np.full(1, math.nan)
    value = percentile(above.values, 100 * quantile) / bottom
    return percentile_interval(value, replicates, len(common))


def log_histogram(values: Sequence[float], least: float) -> Histogram | None:
    """Return counts in ten bins per decade from `least` up to the largest value; None of none.

    The first bin is [0, least). Each bin holds its lower edge.
    """
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    decades = math.log10(max(float(array.max()) / least, 1.0))
    num_bins = math.floor(decades * _BINS_PER_DECADE) + 1
    edges = np.concatenate([[0.0], least * 10.0 ** (np.arange(num_bins + 1) / _BINS_PER_DECADE)])
    counts, _ = np.histogram(array, edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def _only(data: Clustered, clusters: set[Hashable]) -> Clustered:
    kept = [(v, c) for v, c in zip(data.values, data.clusters, strict=True) if c in clusters]
    return Clustered([v for v, _ in kept], [c for _, c in kept])


def _replicates(data: Clustered, labels: NDArray[np.int64], quantile: float) -> Array:
    """Return the quantile of each resample, `(R,)`; the same draws for the same number of labels.

    A resample's sorted values are the data's with each cluster's repeated, so its order statistics
    follow from running counts, and no resample is ever written out.
    """
    values = np.asarray(data.values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    num_steps = min(len(values), _MAX_STEPS)
    steps = np.arange(len(values)) * num_steps // len(values)
    per_step = np.zeros((int(labels.max()) + 1, num_steps))
    np.add.at(per_step, (labels[order], steps), 1)
    largest = values[order][np.flatnonzero(np.diff(steps, append=num_steps))]
    below = draws(len(per_step)) @ per_step.cumsum(axis=1)
    position = quantile * (below[:, -1] - 1)
    lower, upper = (
        largest[(below <= rank[:, None]).sum(axis=1)]
        for rank in (np.floor(position), np.ceil(position))
    )
    replicates: Array = lower + (position - np.floor(position)) * (upper - lower)
    return replicates
