"""Attention on the CPU whose additions have one order, whatever the length and the neighbours.

The keys of a row are taken in blocks of `KEY_BLOCK` columns of the cache, always whole, and the
queries in groups of a fixed number of rows: every product has the same shape. The results of the
blocks are joined by their log-sum-exp, from the first block to the last (Dao et al. 2023,
"FlashAttention-2", section 3.1). A block that a query does not see has the weight 0, so it does
not matter how many blocks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from serve.models.architectures import HeadShape
from serve.models.attention import (
    RowsAttention,
    SlotCache,
    by_key_head,
    filled_up,
    round_up,
    visibility_mask,
)

KEY_BLOCK = 128
# Sizes of a query group, fastest first. Which of them a CPU's kernels compute alike in every
# call is found out at start (`serve.models.batch_invariance`).
QUERY_GROUPS = (4, 8, 16, 32)
# The queries of one call of torch's kernel: below 192 it divides them into blocks of 32.
_MAX_QUERIES = 160

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The tokens `start` to `stop` of each row: one call of the kernel.

    `heads` says which query heads of the tokens it takes, key head by key head, filled up to whole
    query groups. `masks` and `biases` are what to add to the scores, and to the log-sum-exp, by
    window.
    """

    start: int
    stop: int
    num_blocks: int
    heads: Tensor
    masks: dict[int | None, Tensor]
    biases: dict[int | None, Tensor]


class BlockAttention(RowsAttention):
    """New tokens `(B, T)` behind `past_lengths` in the rows from `first_row` on.

    `num_new` of each row are real. `positions` `(B, T)` of the others may be any. The cache has a
    multiple of `KEY_BLOCK` columns.
    """

    def __init__(
        self,
        cache: SlotCache,
        shape: HeadShape,
        windows: Sequence[int | None],
        first_row: int,
        positions: Tensor,
        past_lengths: Sequence[int],
        num_new: Sequence[int],
        query_group: int,
    ) -> None:
        self._num_tokens = positions.shape[1]
        longest = min(max(past_lengths) + self._num_tokens, cache.all.shape[3])
        super().__init__(cache, shape, first_row, positions, round_up(longest, KEY_BLOCK))
        self._windows = windows
        self._slices = [
            (row, past, past + count)
            for row, (past, count) in enumerate(zip(past_lengths, num_new, strict=True), first_row)
        ]
        tokens_per_call = max(_MAX_QUERIES // shape.num_queries_per_key, 1)
        bounds = [*range(0, self._num_tokens, tokens_per_call), self._num_tokens]
        self._chunks = [self._chunk(*pair, query_group) for pair in pairwise(bounds)]

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        shape, batch, num_tokens = self._shape, self._batch, self._num_tokens
        self._write(layer, heads[: batch * num_tokens, shape.num_heads :])
        # A lone token comes twice (`llama.MIN_CPU_ROWS`).
        heads = heads[: batch * num_tokens].reshape(batch, -1, shape.head_dim)
        parts = [self._attended(layer, chunk, heads) for chunk in self._chunks]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return attended.reshape(batch * num_tokens, -1)

    def _attended(self, layer: int, chunk: _Chunk, heads: Tensor) -> Tensor:
        """Return `(B, tokens, num_heads, head_dim)` of a chunk."""
        shape, batch = self._shape, self._batch
        queries = heads.index_select(1, chunk.heads)
        queries = queries.view(batch * shape.num_kv_heads, 1, -1, shape.head_dim)
        keys, values = (
            cached.flatten(0, 1)[:, : chunk.num_blocks * KEY_BLOCK].unflatten(1, (-1, KEY_BLOCK))
            for cached in self._keys_and_values(layer)
        )
        window = self._windows[layer]
        outputs, log_sums = _attend(
            queries.expand(-1, chunk.num_blocks, -1, -1),
            keys,
            values,
            0.0,
            False,
            attn_mask=chunk.masks[window],
        )
        if chunk.num_blocks > 1:
            joined = _joined(outputs, log_sums.add_(chunk.biases[window]))
        else:
            joined = outputs[:, 0]
        num_tokens = chunk.stop - chunk.start
        joined = joined[:, : num_tokens * shape.num_queries_per_key].unflatten(1, (num_tokens, -1))
        by_row: Tensor = joined.unflatten(0, (batch, -1)).transpose(1, 2)
        return by_row.reshape(batch, num_tokens, shape.num_heads, shape.head_dim)

    def _chunk(self, start: int, stop: int, query_group: int) -> _Chunk:
        shape = self._shape
        positions = self._positions[:, start:stop]
        num_blocks = int(positions.max()) // KEY_BLOCK + 1
        num_queries = (stop - start) * shape.num_queries_per_key
        # The queries of one key head: all of its heads for one token, then for the next one.
        query = filled_up(num_queries, query_group)
        token = query // shape.num_queries_per_key
        head = query % shape.num_queries_per_key
        num_heads = shape.num_heads + 2 * shape.num_kv_heads
        first_heads = torch.arange(0, shape.num_heads, shape.num_queries_per_key)
        heads = first_heads[:, None] + (start + token) * num_heads + head
        # One mask does for all queries of a single token.
        seen_from = positions if stop - start == 1 else positions[:, token]
        masks = {window: self._mask(seen_from, num_blocks, window) for window in set(self._windows)}
        biases = {window: mask.amax(-1).float() for window, mask in masks.items()}
        return _Chunk(start, stop, num_blocks, heads.flatten(), masks, biases)

    def _mask(self, positions: Tensor, num_blocks: int, window: int | None) -> Tensor:
        """Return `(B * num_kv_heads or 1, num_blocks, queries or 1, KEY_BLOCK)`."""
        dtype = self._cache.all.dtype
        mask = visibility_mask(positions, num_blocks * KEY_BLOCK, window, dtype)
        by_block: Tensor = mask.unflatten(2, (num_blocks, KEY_BLOCK)).transpose(1, 2)
        return by_key_head(by_block, self._shape)

    def _write(self, layer: int, new: Tensor) -> None:
        tokens = self._cache.tokens[layer]
        new = new.unflatten(1, (2, -1)).unflatten(0, (self._batch, self._num_tokens))
        if self._num_tokens == 1:
            tokens.index_put_((self._rows, self._positions[:, 0]), new[:, 0])
            return
        for source, (row, start, stop) in zip(new, self._slices, strict=True):
            tokens[row, start:stop] = source[: stop - start]


def _joined(outputs: Tensor, log_sums: Tensor) -> Tensor:
    """Return the attention over all blocks, `(N, queries, D)`, of that over each one.

    `outputs` is `(N, blocks, queries, D)`; `log_sums` `(N, blocks, queries)`, float32, are the
    log-sum-exp of a block's scores, -inf where all of it is hidden.
    """
    weights = torch.exp(log_sums - log_sums.amax(1, keepdim=True))[..., None]
    weighted = (outputs * weights).unbind(1)
    total, weight = weighted[0], weights[:, 0]
    # One after the other: the order of a sum depends on how many there are.
    for part, part_weight in zip(weighted[1:], weights.unbind(1)[1:], strict=True):
        total = total.add_(part)
        weight = weight + part_weight
    return total.div_(weight).to(outputs.dtype)
