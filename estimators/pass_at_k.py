"""pass@k: the chance that at least one of k samples is right, estimated from n ≥ k samples."""

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(
    num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike
) -> float | NDArray[np.float64]: ...
def pass_at_k(
    num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike
) -> float | NDArray[np.float64]:
    """Return the unbiased estimate 1 − C(n − c, k) / C(n, k), n samples of which c are correct.

    It is the chance that k of the n samples, drawn without replacement, hold a correct one.

    Args:
        num_samples, num_correct, k: integers, or integer arrays that broadcast together.

    Returns:
        A float for three scalars, else a float64 array of the broadcast shape; in [0, 1].

    Raises:
        ValueError: unless 0 ≤ num_correct ≤ num_samples and 1 ≤ k ≤ num_samples; k > num_samples
            has no unbiased estimate, also when no sample is correct. Also for non-integers.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021), eq. 1, in
    the product form of its figure 3, summed in logarithms so that small values keep their digits.

    >>> pass_at_k(8, 1, 4)
    0.5
    >>> pass_at_k(10, [0, 5, 10], 1).tolist()
    [0.0, 0.5, 1.0]
    >>> pass_at_k(8, 0, 9)
    Traceback (most recent call last):
        ...
    ValueError: k = 9 with num_samples = 8: k must be 1 to num_samples
    """
    counts = [
        _integers(name, values)
        for name, values in (("num_samples", num_samples), ("num_correct", num_correct), ("k", k))
    ]
    estimates: NDArray[np.float64] = np.vectorize(_pass_at_k, otypes=[np.float64])(*counts)
    return estimates if estimates.ndim else float(estimates)


def _pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    if num_samples < 0:
        raise ValueError(f"num_samples = {num_samples}: it must not be negative")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"num_correct = {num_correct} with num_samples = {num_samples}:"
            " num_correct must be 0 to num_samples"
        )
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} with num_samples = {num_samples}: k must be 1 to num_samples")
    if num_correct == 0:
        return 0.0
    if num_samples - num_correct < k:
        return 1.0
    remaining = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(-np.expm1(np.log1p(-k / remaining).sum()))


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} = {values!r}: it must be an integer or an array of integers")
    return array.astype(np.int64)
