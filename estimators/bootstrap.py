"""Bootstrap confidence intervals where the prompt is what was sampled, not the token.

Tokens of one prompt are alike, so clusters (prompts) are resampled whole. Resamples follow from
the seed and the number of clusters alone: the same call gives the same interval.

Where the data cannot show any spread the interval is None: one cluster, clusters that are all
alike (a resample of them never differs, and a width of 0 would claim certainty), no clusters.

By hand, because `scipy.stats.bootstrap` draws other resamples from a seed, so that the intervals of
all earlier runs would move, and gives clusters that are alike a width of rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from estimators.estimate import Estimate

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Takes column sums over clusters, `(..., C)`, and returns the estimate of each, `(...)`."""

_NORMAL = NormalDist()
# Sums of the same clusters in other numbers differ by this much, relatively, by rounding alone.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Resampling:
    """How to bootstrap. Of `num_resamples`, 2,000 is the order that BCa needs (E&T, 14.3)."""

    num_resamples: int = 2000
    confidence: float = 0.95
    method: Literal["bca", "percentile"] = "bca"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples = {self.num_resamples}: it must be positive")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence = {self.confidence}: it must be between 0 and 1")


DEFAULT = Resampling()


def bootstrap_mean(values: ArrayLike, resampling: Resampling = DEFAULT) -> Estimate:
    """Return the mean over clusters, `(N,)`, with its interval.

    Raises:
        ValueError: for no clusters, or values that are not finite.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 13 and 14.

    >>> bootstrap_mean([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).value
    0.6666666666666666
    >>> bootstrap_mean([0.4])
    Estimate(value=0.4, low=None, high=None, n=1)
    >>> bootstrap_mean([])
    Traceback (most recent call last):
        ...
    ValueError: no clusters: there is nothing to estimate from
    """
    array = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(array, np.ones_like(array), resampling)


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, resampling: Resampling = DEFAULT
) -> Estimate:
    """Return Σ numerators / Σ denominators over clusters, `(N,)` each, with its interval.

    KL per token is such a ratio: a prompt's summed KL over its number of tokens.

    Raises:
        ValueError: as `bootstrap_mean`, for different lengths, or denominators not positive.

    Source: Efron & Tibshirani (1993), section 10.6 for the ratio, chapter 14 for its interval.
    """
    return _bootstrap(_ratio_columns(numerators, denominators), _ratio, resampling)


def bootstrap_mean_difference(
    a: ArrayLike, b: ArrayLike, resampling: Resampling = DEFAULT
) -> Estimate:
    """Return mean(b) − mean(a), paired: cluster i is the same prompt in both, `(N,)` each.

    Raises:
        ValueError: as `bootstrap_mean`, or for different lengths.
    """
    first, second = _columns(a, b).T
    return bootstrap_mean(second - first, resampling)


def bootstrap_ratio_difference(
    a_numerators: ArrayLike,
    a_denominators: ArrayLike,
    b_numerators: ArrayLike,
    b_denominators: ArrayLike,
    resampling: Resampling = DEFAULT,
) -> Estimate:
    """Return ratio b − ratio a, paired: every resample draws the same prompts for both.

    Shapes and errors as `bootstrap_ratio`.
    """
    clusters = np.hstack(
        [
            _ratio_columns(a_numerators, a_denominators),
            _ratio_columns(b_numerators, b_denominators),
        ]
    )
    return _bootstrap(clusters, lambda sums: _ratio(sums[..., 2:]) - _ratio(sums), resampling)


def _ratio(sums: Array) -> Array:
    ratios: Array = sums[..., 0] / sums[..., 1]
    return ratios


def _ratio_columns(numerators: ArrayLike, denominators: ArrayLike) -> Array:
    columns = _columns(numerators, denominators)
    if (columns[:, 1] <= 0).any():
        raise ValueError(f"denominators as low as {columns[:, 1].min()}: they must be positive")
    return columns


def _columns(first: ArrayLike, second: ArrayLike) -> Array:
    """Return two values per cluster as `(N, 2)`."""
    columns = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    if columns[0].shape != columns[1].shape or columns[0].ndim != 1:
        shapes = " and ".join(str(column.shape) for column in columns)
        raise ValueError(f"shapes {shapes}: both must be (N,), one value per cluster")
    return np.stack(columns, axis=1)


def _bootstrap(clusters: Array, statistic: Statistic, resampling: Resampling) -> Estimate:
    num_clusters = len(clusters)
    if not num_clusters:
        raise ValueError("no clusters: there is nothing to estimate from")
    if not np.isfinite(clusters).all():
        raise ValueError("clusters hold NaN or infinity: leave them out or report no estimate")
    estimate = float(statistic(clusters.sum(0)))
    rng = np.random.default_rng(resampling.seed)
    shares = np.full(num_clusters, 1 / num_clusters)
    counts = rng.multinomial(num_clusters, shares, size=resampling.num_resamples)
    replicates = statistic(counts @ clusters)
    if np.ptp(replicates) <= _ROUNDING * np.abs(replicates).max():
        return Estimate(estimate, n=num_clusters)
    levels = np.array([(1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2])
    if resampling.method == "bca":
        jackknife = statistic(clusters.sum(0) - clusters)
        levels = _bca_levels(levels, replicates, estimate, jackknife)
    low, high = np.quantile(replicates, levels)
    return Estimate(estimate, float(low), float(high), num_clusters)


def _bca_levels(levels: Array, replicates: Array, estimate: float, jackknife: Array) -> Array:
    """Return the levels of the quantiles that make the interval second-order accurate.

    Source: Efron & Tibshirani (1993), eq. 14.10; the bias correction is 14.14, the acceleration
    14.15. Replicates that tie with the estimate count half, and half a replicate is added on
    either side so that the correction stays finite.
    """
    num_below = (replicates < estimate).sum() + (replicates == estimate).sum() / 2
    bias = _NORMAL.inv_cdf(float((num_below + 0.5) / (len(replicates) + 1)))
    deviations = jackknife.mean() - jackknife
    spread = (deviations**2).sum()
    acceleration = (deviations**3).sum() / (6 * spread**1.5) if spread else 0.0
    shifted = bias + np.array([_NORMAL.inv_cdf(level) for level in levels])
    corrected = bias + shifted / (1 - acceleration * shifted)
    return np.array([_NORMAL.cdf(value) for value in corrected])
