"""KL(float student ‖ side) on held-out answers, teacher-forced, from logits that workers saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from estimators.divergence import exact_kl

# `exact_kl` holds some eight float64 arrays of a slice's size.
_SLICE_ROWS = 64


def mean_kl(reference: Path, other: Path) -> tuple[float, int]:
    """Return the mean over tokens of KL(reference ‖ other) in nats, and how many tokens.

    Both files hold raw logits of the same positions, `(N, V)` float32.
    """
    policy, model = np.load(reference, mmap_mode="r"), np.load(other, mmap_mode="r")
    assert policy.shape == model.shape, (policy.shape, model.shape)
    slices = [slice(start, start + _SLICE_ROWS) for start in range(0, len(policy), _SLICE_ROWS)]
    total = sum(float(exact_kl(policy[here], model[here]).sum()) for here in slices)
    return total / len(policy), len(policy)
