"""How far a model is from itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve.models.noise import NoiseFloor, measure_noise_floor


@pytest.mark.parametrize("max_model_len", [2, 3, 24, 64])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_noise_floor_of_a_backend_without_rounding_is_zero(
    make_backend: Any, max_model_len: int, max_num_seqs: int
) -> None:
    backend = make_backend(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert measure_noise_floor(backend) == NoiseFloor(0.0, 0.0)


@pytest.mark.parametrize(("kind", "is_noisy"), [("path", [True, False]), ("batch", [False, True])])
def test_noise_floor_is_the_largest_difference_in_nats(
    make_backend: Any, kind: str, is_noisy: list[bool]
) -> None:
    class Noisy(make_backend):  # type: ignore[misc]
        def forward(self, first_row: int, new_token_ids: Any, *rest: Any) -> torch.Tensor:
            logits: torch.Tensor = super().forward(first_row, new_token_ids, *rest)
            is_one_pass = len(new_token_ids[0]) > 12
            is_off = is_one_pass if kind == "path" else len(new_token_ids) > 1
            return logits * 1.1 if is_off else logits

    noise = measure_noise_floor(Noisy())
    assert [0.01 < nats < 1.0 for nats in (noise.path_nats, noise.batch_nats)] == is_noisy
