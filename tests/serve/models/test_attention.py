"""Which keys are seen over slots, by the kernels of CUDA and, in blocks of keys, of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from serve.models.architectures import HeadShape
from serve.models.attention import (
    QUERY_ALIGNMENT,
    ManyTokenAttention,
    OneTokenAttention,
    SlotCache,
    visibility_mask,
)
from serve.models.block_attention import KEY_BLOCK, BlockAttention
from serve.models.kv_cache import KVCache
from serve.models.llama import Attention

NUM_COLUMNS = 8 * KEY_BLOCK
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


def slots(shape: HeadShape, dtype: torch.dtype = torch.float32) -> SlotCache:
    size = (4, shape.num_kv_heads, NUM_COLUMNS, shape.head_dim)
    return SlotCache(KVCache(2, size, dtype, torch.device("cpu")))


def projected(shape: HeadShape, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    return torch.randn(num_tokens, num_heads, shape.head_dim, generator=generator).to(dtype)


def naive(heads: torch.Tensor, shape: HeadShape, window: int | None = None) -> torch.Tensor:
    """Return the causal attention of one row's tokens `(T, heads, D)`, head by head."""
    queries, keys, values = heads.split([shape.num_heads, *[shape.num_kv_heads] * 2], dim=1)
    size, positions = shape.num_queries_per_key, torch.arange(len(heads))
    age = positions[:, None] - positions
    hidden = (age < 0) | (age >= (window or len(heads)))
    attended = []
    for head in range(shape.num_heads):
        scores = queries[:, head] @ keys[:, head // size].T / shape.head_dim**0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended.append(weights @ values[:, head // size])
    return torch.cat(attended, dim=1)


def slotted(cache: SlotCache, shape: HeadShape, past: int, count: int) -> Attention:
    positions = past + torch.arange(count)[None]
    return ManyTokenAttention(cache, shape, [None, None], 1, positions, [past])


def blocked(
    cache: SlotCache, shape: HeadShape, past: int, count: int, window: int | None = None
) -> Attention:
    positions = past + torch.arange(count)[None]
    return BlockAttention(cache, shape, [None, window], 1, positions, [past], [count], 4)


@pytest.mark.parametrize("attend", [slotted, blocked])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_see_what_came_before(shape: HeadShape, attend: Callable[..., Attention]) -> None:
    heads, cache = projected(shape, 24, torch.float32), slots(shape)
    parts = [attend(cache, shape, past, 8)(1, heads[past : past + 8]) for past in (0, 8, 16)]
    torch.testing.assert_close(torch.cat(parts), naive(heads, shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 100, KEY_BLOCK, 300])
def test_blocks_of_keys_join_to_the_whole(shape: HeadShape, window: int | None) -> None:
    num_tokens = 3 * KEY_BLOCK + 20
    heads, cache = projected(shape, num_tokens, torch.float32), slots(shape)
    attended = blocked(cache, shape, 0, num_tokens, window)(1, heads)
    torch.testing.assert_close(attended, naive(heads, shape, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_beside_a_longer_row_change_no_bit(shape: HeadShape, dtype: torch.dtype) -> None:
    heads, cache = projected(shape, 200, dtype), slots(shape, dtype)
    alone = blocked(cache, shape, 0, 200)(1, heads)
    positions = torch.tensor([[199], [900]])
    step = BlockAttention(cache, shape, [None, None], 1, positions, [199, 900], [1, 1], 4)
    assert torch.equal(step(1, heads[[199, 0]])[0], alone[199])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_over_slots_is_the_one_among_many(shape: HeadShape) -> None:
    heads, cache = projected(shape, 12 * QUERY_ALIGNMENT, torch.float32), slots(shape)
    expected = slotted(cache, shape, 0, len(heads))(1, heads)
    for position in (0, 20, 47):
        attention = OneTokenAttention(cache, shape, [None, None], 1, torch.tensor([position]), 48)
        again = heads[position].expand(2, -1, -1)
        torch.testing.assert_close(attention(1, again)[0], expected[position])


@pytest.mark.parametrize("kind", [ManyTokenAttention, BlockAttention])
def test_only_real_tokens_of_own_rows_are_written(kind: Callable[..., Attention]) -> None:
    shape = HeadShape(2, 1, 4)
    cache, heads = slots(shape), projected(shape, 8, torch.float32)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    more = ([4, 2], 4) if kind is BlockAttention else ()
    kind(cache, shape, [None, None], 1, positions, [0, 5], *more)(0, heads)
    where = [(0, 1, p) for p in range(4)] + [(0, 2, 5), (0, 2, 6)]
    if kind is ManyTokenAttention:  # what lies behind a row's tokens, where nobody looks
        where += [(0, 2, 7), (0, 2, 8)]
    expected = torch.zeros(2, 4, NUM_COLUMNS, dtype=torch.bool)
    for layer, row, column in where:
        expected[layer, row, column] = True
    written = torch.stack([tokens.flatten(2).any(-1) for tokens in cache.tokens])
    assert torch.equal(written, expected)
