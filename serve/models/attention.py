"""Attention over rows of the KV cache, each of its own length; the kernels of CUDA.

Query heads that share a KV head are never given copies of it. On the CPU it is
`serve.models.block_attention` that attends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from serve.models.architectures import HeadShape
from serve.models.kv_cache import KVCache

# Of queries, and of the columns of the cache that a step attends to.
QUERY_ALIGNMENT = 4
KEY_ALIGNMENT = 16


class SlotCache:
    """A cache with a view per layer in which the keys and values of a token lie together.

    `tokens[layer]` is `(rows, max_len, 2, num_kv_heads, head_dim)`; `all` has keys, then values,
    of all layers, `(2 * num_layers, rows, num_kv_heads, max_len, head_dim)`.
    """

    def __init__(self, cache: KVCache) -> None:
        self.all = cache.tensor
        self.num_layers = len(cache.keys)
        pairs = (self.all[layer :: self.num_layers] for layer in range(self.num_layers))
        self.tokens = [pair.permute(1, 3, 0, 2, 4) for pair in pairs]


class RowsAttention:
    """What all attention over slots has: the cached tokens of a batch of rows from `first_row` on.

    The subclasses write the new keys and values, and attend: see `serve.models.llama.Attention`.
    New tokens stand at `positions`, `(B,)` or `(B, T)`; `num_keys` columns are attended to.
    """

    def __init__(
        self, cache: SlotCache, shape: HeadShape, first_row: int, positions: Tensor, num_keys: int
    ) -> None:
        self._cache, self._shape, self._positions = cache, shape, positions
        self._batch = len(positions)
        stop = first_row + self._batch
        self._rows = torch.arange(first_row, stop, device=positions.device)
        self._cached = cache.all[:, first_row:stop, :, :num_keys].unbind(0)

    def _keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return `(B, num_kv_heads, num_keys, head_dim)` of both."""
        return self._cached[layer], self._cached[self._cache.num_layers + layer]


class OneTokenAttention(RowsAttention):
    """One new token in each of the rows from `first_row` on, at `positions` `(B,)`.

    No value on the host depends on the positions and none is copied from there, so that a CUDA
    graph can be captured.
    """

    def __init__(
        self,
        cache: SlotCache,
        shape: HeadShape,
        windows: Sequence[int | None],
        first_row: int,
        positions: Tensor,
        num_keys: int,
    ) -> None:
        super().__init__(cache, shape, first_row, positions, num_keys)
        masks = {
            window: visibility_mask(positions[:, None, None], num_keys, window, cache.all.dtype)
            for window in set(windows)
        }
        self._masks = [masks[window] for window in windows]
        self._query_heads = _padded_groups(shape, positions.device)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        shape, batch = self._shape, self._batch
        new = heads[:batch, shape.num_heads :]
        new = new.view(batch, 2, shape.num_kv_heads, shape.head_dim)
        self._cache.tokens[layer].index_put_((self._rows, self._positions), new)
        queries = heads[:batch].index_select(1, self._query_heads)
        attended = scaled_dot_product_attention(
            queries.view(batch, shape.num_kv_heads, -1, shape.head_dim),
            *self._keys_and_values(layer),
            attn_mask=self._masks[layer],
        )
        return attended[:, :, : shape.num_queries_per_key].reshape(batch, -1)


class ManyTokenAttention(RowsAttention):
    """New tokens `(B, T)` behind `past_lengths` in the rows from `first_row` on; T is a
    multiple of `QUERY_ALIGNMENT`.

    Those behind a row's real tokens, which pad it, are written too, where nobody looks.
    """

    def __init__(
        self,
        cache: SlotCache,
        shape: HeadShape,
        windows: Sequence[int | None],
        first_row: int,
        positions: Tensor,
        past_lengths: Sequence[int],
    ) -> None:
        self._num_tokens = positions.shape[1]
        longest = min(max(past_lengths) + self._num_tokens, cache.all.shape[3])
        num_keys = round_up(longest, KEY_ALIGNMENT)
        super().__init__(cache, shape, first_row, positions, num_keys)
        self._is_first = not any(past_lengths)
        masks = {w: self._mask(num_keys, w) for w in set(windows)}
        self._masks = [masks[window] for window in windows]

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        shape, batch, num_tokens = self._shape, self._batch, self._num_tokens
        groups = heads.view(batch, num_tokens, -1, shape.num_kv_heads, shape.head_dim)
        where = (self._rows[:, None], self._positions)
        self._cache.tokens[layer].index_put_(where, groups[:, :, -2:])
        queries = heads[:, : shape.num_heads].view(
            batch, num_tokens, shape.num_kv_heads, -1, shape.head_dim
        )
        keys, values = self._keys_and_values(layer)
        attended = scaled_dot_product_attention(
            queries.permute(0, 2, 3, 1, 4).flatten(0, 1),
            self._shared(keys),
            self._shared(values),
            attn_mask=self._masks[layer],
            is_causal=self._masks[layer] is None,
        )
        attended = attended.view(batch, shape.num_heads, num_tokens, shape.head_dim)
        return attended.transpose(1, 2).reshape(batch * num_tokens, -1)

    def _shared(self, cached: Tensor) -> Tensor:
        """Return `(B * num_kv_heads, G, L, head_dim)`, without copying, for G queries per key."""
        return cached.flatten(0, 1)[:, None].expand(-1, self._shape.num_queries_per_key, -1, -1)

    def _mask(self, num_keys: int, window: int | None) -> Tensor | None:
        """Return `(B * num_kv_heads or 1, 1, T, L)`, or None where `is_causal` does."""
        if self._is_first and (window is None or window >= self._num_tokens):
            return None
        mask = visibility_mask(self._positions, num_keys, window, self._cache.all.dtype)
        return by_key_head(mask[:, None], self._shape)


def visibility_mask(
    positions: Tensor, num_keys: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Return what to add to the scores, `(*positions, num_keys)`: 0, or -inf where hidden.

    A token sees the `window` newest keys, its own included, or all.
    """
    age = positions[..., None] - torch.arange(num_keys, device=positions.device)
    is_hidden = age < 0 if window is None else (age < 0) | (age >= window)
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(is_hidden, -torch.inf)


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple.

    >>> round_up(17, 16)
    32
    """
    return -(-number // multiple) * multiple


def by_key_head(mask: Tensor, shape: HeadShape) -> Tensor:
    """Return a mask `(B, ...)` once per key head, `(B * num_kv_heads, ...)`; one row's as it is."""
    return mask if len(mask) == 1 else mask.repeat_interleave(shape.num_kv_heads, 0)


def filled_up(count: int, multiple: int, device: torch.device | None = None) -> Tensor:
    """Return 0 to `count` - 1, and the last one again up to the next multiple.

    >>> filled_up(3, 4).tolist()
    [0, 1, 2, 2]
    """
    return torch.arange(round_up(count, multiple), device=device).clamp_max(count - 1)


def _padded_groups(shape: HeadShape, device: torch.device) -> Tensor:
    """Return the query heads by group, each group filled up to `QUERY_ALIGNMENT` with its last."""
    group = filled_up(shape.num_queries_per_key, QUERY_ALIGNMENT, device)
    starts = torch.arange(0, shape.num_heads, shape.num_queries_per_key, device=device)
    return (starts[:, None] + group).flatten()
