"""The parts of a decoder against transformers' own modules, to the bit where rounding is shared."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from serve.models.architectures import HeadShape
from serve.models.llama import (
    in_row_groups,
    make_linear,
    make_norm,
    rotary_table,
    rotate,
    silu,
)

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, module = random(50, 96, dtype=dtype), LlamaRMSNorm(96, eps=1e-5).to(dtype)
    module.weight.data.uniform_(0.5, 1.5)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 2**-7, "atol": 0}
    actual = make_norm(module.weight, 1e-5)(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, module(x).detach(), **tolerance)


def test_norm_adds_eps_to_the_mean_square() -> None:
    x = torch.full((2, 4), 1e-3)
    torch.testing.assert_close(make_norm(torch.ones(4), 3e-6)(x), torch.full((2, 4), 0.5))


@pytest.mark.parametrize("num_rows", [2, 3, 64, 300])
def test_norm_of_a_row_has_the_same_bits_in_every_batch(num_rows: int) -> None:
    x, norm = random(300, 576, dtype=torch.bfloat16), make_norm(random(576, seed=1), 1e-5)
    assert torch.equal(norm(x[:num_rows]), norm(x)[:num_rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_that_of_transformers(dtype: torch.dtype) -> None:
    heads, angles = random(7, 5, 16, dtype=dtype), torch.rand(7, 8).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=1)
    rotate(heads, *rotary_table(cos, sin)[:, :, None].unbind(1))
    assert torch.equal(heads, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.cat([random(1000) * 4, torch.tensor([0.0, -0.0, -200.0, 200.0])]).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 17, 100])
def test_silu_has_the_same_bits_at_every_place(dtype: torch.dtype, width: int) -> None:
    x = (random(4000) * 4).to(dtype)
    whole, first_whole = silu(x), x.clone()
    for start in range(0, 3000, 293):
        assert torch.equal(silu(x[start : start + width].clone()), whole[start : start + width])
    assert torch.equal(x, first_whole)


@pytest.mark.parametrize("num_rows", [2, 5, 16, 33])
def test_products_in_row_groups_are_those_of_all_rows(num_rows: int) -> None:
    x, linear = random(num_rows, 32), make_linear(random(24, 32, seed=1), None)
    shapes: list[int] = []

    def counted(rows: torch.Tensor) -> torch.Tensor:
        shapes.append(len(rows))
        return linear(rows)

    torch.testing.assert_close(in_row_groups(16, counted, x), linear(x), rtol=1e-5, atol=1e-5)
    assert set(shapes) == {16}


def test_without_instructions_for_a_type_its_products_are_those_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = random(5, 32, dtype=torch.bfloat16), random(24, 32, dtype=torch.bfloat16, seed=1)
    monkeypatch.setattr("serve.models.llama.has_products", lambda dtype: dtype == torch.float32)
    assert torch.equal(
        make_linear(weight, None)(x), make_linear(weight.float(), None)(x.float()).bfloat16()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_a_product_and_a_bias(dtype: torch.dtype, has_bias: bool) -> None:
    x, weight = random(5, 32, dtype=dtype), random(24, 32, dtype=dtype, seed=1)
    bias = random(24, dtype=dtype, seed=2) if has_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        make_linear(weight, bias)(x), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [2, 3, 16, 33])
def test_product_of_a_row_has_the_same_bits_in_every_batch(
    dtype: torch.dtype, num_rows: int
) -> None:
    x, linear = random(64, 576, dtype=dtype), make_linear(random(96, 576, dtype=dtype), None)
    assert torch.equal(linear(x[:num_rows]), linear(x)[:num_rows])


def test_shape_counts_what_is_rotated_and_what_shares_a_key() -> None:
    shape = HeadShape(num_heads=9, num_kv_heads=3, head_dim=64)
    assert (shape.num_rotated, shape.num_queries_per_key) == (12, 3)
