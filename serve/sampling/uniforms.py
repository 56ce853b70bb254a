"""Counter-based uniforms: a number for each (seed, sample index, position), whatever came before.

Three rounds of the SplitMix64 finalizer (Steele et al. 2014, "Fast splittable pseudorandom number
generators", section 4) keyed by the triple; the top 53 bits are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def uniforms(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """Return one uniform in [0, 1) for each (seed, sample index, position), shape `(B,)`."""
    return uniforms_at(uniform_keys(seeds, sample_indices), positions)


def uniform_keys(seeds: Sequence[int], sample_indices: Sequence[int]) -> NDArray[np.uint64]:
    """Return the first two rounds, `(B,)`: they last as long as a sequence does."""
    return _mix64(
        _mix64(np.asarray(seeds, dtype=np.uint64)) ^ np.asarray(sample_indices, dtype=np.uint64)
    )


def uniforms_at(keys: NDArray[np.uint64], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return the uniforms of `keys` at `positions`, `(B,)`."""
    state = _mix64(keys ^ np.asarray(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
