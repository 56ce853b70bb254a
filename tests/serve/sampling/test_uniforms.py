"""The counter-based uniforms against their reference values."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.sampling.uniforms import uniforms


def slow_mix(word: int) -> int:
    z = (word + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(0, 2**20))
def test_uniform_is_three_rounds_of_splitmix64(seed: int, index: int, position: int) -> None:
    # The first output of the public reference implementation for these two seeds.
    assert [slow_mix(0), slow_mix(1234567)] == [0xE220A8397B1DCDAF, 6457827717110365317]
    (u,) = uniforms([seed], [index], [position])
    assert u == (slow_mix(slow_mix(slow_mix(seed) ^ index) ^ position) >> 11) / 2**53
    assert 0.0 <= u < 1.0


def test_uniforms_are_different_for_every_seed_index_and_position() -> None:
    seeds, indices, positions = (a.ravel().tolist() for a in np.mgrid[:10, :10, :10])
    u = uniforms(seeds, indices, positions)
    assert len(set(u.tolist())) == 1000
    assert abs(u.mean() - 0.5) < 0.03
