"""Which keys are seen, and which key and query lengths leave a row's bits alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from serve.decoder import HeadShape
from serve.kv_cache import KVCache
from serve.slot_attention import (
    QUERY_ALIGNMENT,
    ManyTokenAttention,
    OneTokenAttention,
    SlotCache,
    key_length,
    visibility_mask,
)

NUM_COLUMNS = 1040
DTYPES = [torch.float32, torch.bfloat16]
# Groups of one, of some and of all query heads.
SHAPES = [HeadShape(2, 2, 16), HeadShape(6, 2, 16), HeadShape(5, 1, 16), HeadShape(1, 1, 16)]


@pytest.mark.parametrize(
    ("window", "expected"),
    [(None, [[1, 1, 0, 0], [1, 1, 1, 1]]), (2, [[1, 1, 0, 0], [0, 0, 1, 1]])],
)
def test_token_sees_itself_and_what_its_window_holds(
    window: int | None, expected: list[list[int]]
) -> None:
    mask = visibility_mask(torch.tensor([1, 3]), 4, window, torch.float32)
    assert mask.isneginf().logical_not().int().tolist() == expected
    assert mask[mask.isfinite()].unique().tolist() == [0.0]


def test_key_length_never_falls_and_is_its_own() -> None:
    lengths = [key_length(n) for n in range(1, 1600)]
    assert all(a <= b for a, b in pairwise(lengths))
    assert all(n <= length == key_length(length) for n, length in enumerate(lengths, start=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_visible", [150, 200, 300, 380, 600, 730])
@pytest.mark.parametrize("num_queries", [4, 36])
def test_hidden_keys_change_no_bit(dtype: torch.dtype, num_visible: int, num_queries: int) -> None:
    generator = torch.Generator().manual_seed(num_visible)
    query, keys, values = (
        torch.randn(2, 2, n, 64, generator=generator).to(dtype)
        for n in (num_queries, NUM_COLUMNS, NUM_COLUMNS)
    )

    def attend(num_keys: int) -> torch.Tensor:
        mask = visibility_mask(torch.tensor([num_visible - 1]), num_keys, None, dtype)
        return scaled_dot_product_attention(
            query, keys[:, :, :num_keys], values[:, :, :num_keys], attn_mask=mask
        )

    expected = attend(NUM_COLUMNS)
    for num_keys in {key_length(n) for n in range(num_visible, NUM_COLUMNS, 48)}:
        assert torch.equal(attend(num_keys), expected), num_keys


def slots(shape: HeadShape, dtype: torch.dtype = torch.float32) -> SlotCache:
    size = (4, shape.num_kv_heads, NUM_COLUMNS, shape.head_dim)
    return SlotCache(KVCache(2, size, dtype, torch.device("cpu")))


def projected(shape: HeadShape, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    return torch.randn(num_tokens, num_heads, shape.head_dim, generator=generator).to(dtype)


def naive(heads: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    """Return the causal attention of one row's tokens `(T, heads, D)`, head by head."""
    queries, keys, values = heads.split([shape.num_heads, *[shape.num_kv_heads] * 2], dim=1)
    size, hidden = shape.num_queries_per_key, torch.ones(len(heads), len(heads)).triu(1).bool()
    attended = []
    for head in range(shape.num_heads):
        scores = queries[:, head] @ keys[:, head // size].T / shape.head_dim**0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended.append(weights @ values[:, head // size])
    return torch.cat(attended, dim=1)


def many(cache: SlotCache, shape: HeadShape, past: int, heads: torch.Tensor) -> torch.Tensor:
    positions = past + torch.arange(len(heads))[None]
    attention = ManyTokenAttention(cache, shape, [None, None], 1, positions, [past], [len(heads)])
    return attention(1, heads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_see_what_came_before(shape: HeadShape) -> None:
    heads, cache = projected(shape, 24, torch.float32), slots(shape)
    parts = [many(cache, shape, past, heads[past : past + 8]) for past in (0, 8, 16)]
    torch.testing.assert_close(torch.cat(parts), naive(heads, shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_has_the_bits_it_has_among_many(shape: HeadShape, dtype: torch.dtype) -> None:
    heads, cache = projected(shape, 12 * QUERY_ALIGNMENT, dtype), slots(shape, dtype)
    expected = many(cache, shape, 0, heads)
    for position in (0, 20, 47):
        attention = OneTokenAttention(
            cache, shape, [None, None], 1, torch.tensor([position]), key_length(48)
        )
        again = heads[position].expand(2, -1, -1)  # a lone row is computed twice
        assert torch.equal(attention(1, again)[0], expected[position])


def test_only_real_tokens_of_own_rows_are_written() -> None:
    shape = HeadShape(2, 1, 4)
    cache, heads = slots(shape), projected(shape, 8, torch.float32)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    ManyTokenAttention(cache, shape, [None, None], 1, positions, [0, 5], [4, 2])(0, heads)
    where = [(0, 1, p) for p in range(4)] + [(0, 2, 5), (0, 2, 6)]
    expected = torch.zeros(2, 4, NUM_COLUMNS, dtype=torch.bool)
    for layer, row, column in where:
        expected[layer, row, column] = True
    written = torch.stack([tokens.flatten(2).any(-1) for tokens in cache.tokens])
    assert torch.equal(written, expected)
