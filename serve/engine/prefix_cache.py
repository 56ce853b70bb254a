"""Keys and values of prompts that came before, in blocks, so that repeating a prompt is a copy.

A block is found by the hash of everything in front of it: two prompts share the blocks of their
common beginning. A whole prompt's last, shorter block also holds the logits behind it. Blocks that
were not used for longest go first.

Restored keys are the very bits that computing them would give
(docs/decisions/001-batch-invariance.md), so a hit changes the time of an answer and nothing else.
That time is visible: only prompts with the same `cache_salt` share blocks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from serve.models.backend import Backend

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """`block_names` name its full blocks of `BLOCK_TOKENS`, `whole_name` the rest and its logits.

    A name is a hash of everything up to the block's end, keyed by the salt. At least two tokens are
    behind the last full block: a lone one would run by the kernels of a decode step, whose bits
    differ from those of a prefill. `whole_name` is None for a prompt that is not to be cached.
    """

    token_ids: tuple[int, ...]
    block_names: tuple[bytes, ...] = ()
    whole_name: bytes | None = None

    @classmethod
    def of(cls, token_ids: tuple[int, ...], cache_salt: str | None) -> TokenizedPrompt:
        """Name the blocks; prompts share them within one `cache_salt`. None: it is not cached."""
        if cache_salt is None:
            return cls(token_ids)
        ids = np.array(token_ids, dtype="<u4")
        state = hashlib.blake2b(digest_size=16, key=hashlib.sha256(cache_salt.encode()).digest())
        num_full = max(len(ids) - 2, 0) // BLOCK_TOKENS * BLOCK_TOKENS
        names = []
        for block in ids[:num_full].reshape(-1, BLOCK_TOKENS):
            state.update(block.tobytes())
            names.append(state.digest())
        state.update(b"." + ids[num_full:].tobytes())
        return cls(token_ids, tuple(names), state.digest())


def chunk_size(num_left: int, max_tokens: int) -> int:
    """Return how many of a prompt's `num_left` tokens the next pass takes.

    It never leaves a lone token: that would run by the kernels of a decode step, and have their
    bits.

    >>> [chunk_size(n, 4) for n in (1, 4, 5, 6, 9)]
    [1, 4, 3, 4, 4]
    """
    if num_left <= max_tokens:
        return num_left
    return max_tokens - 1 if num_left == max_tokens + 1 else max_tokens


@dataclass(frozen=True, slots=True)
class _Block:
    kv: torch.Tensor
    logits: torch.Tensor | None

    @property
    def size_bytes(self) -> int:
        return self.kv.nbytes + (0 if self.logits is None else self.logits.nbytes)


class PrefixCache:
    """At most `max_bytes` of blocks on the backend's device; 0 keeps nothing."""

    def __init__(self, backend: Backend, max_bytes: int) -> None:
        self._backend = backend
        self.max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.size_bytes = 0

    def count_cached(self, prompt: TokenizedPrompt) -> int:
        """Return how many leading tokens `restore` would bring; all of them: the logits, too."""
        names = prompt.block_names
        num_blocks = next((i for i, name in enumerate(names) if name not in self._blocks), None)
        if num_blocks is not None:
            return num_blocks * BLOCK_TOKENS
        if prompt.whole_name in self._blocks:
            return len(prompt.token_ids)
        return len(names) * BLOCK_TOKENS

    def restore(self, prompt: TokenizedPrompt, row: int) -> tuple[int, torch.Tensor | None]:
        """Write what is cached into `row`; returns the number of tokens, and logits `(V,)`.

        The logits are those behind the prompt, None unless the whole prompt was cached.
        """
        num_cached = self.count_cached(prompt)
        names = list(prompt.block_names[: num_cached // BLOCK_TOKENS])
        if num_cached == len(prompt.token_ids) and prompt.whole_name is not None:
            names.append(prompt.whole_name)
        blocks = [self._blocks[name] for name in names]
        for index, block in enumerate(blocks):
            self._backend.write_kv(row, index * BLOCK_TOKENS, block.kv)
        # The beginning of a prompt is useful longer than its end.
        for name in reversed(names):
            self._blocks.move_to_end(name)
        return num_cached, blocks[-1].logits if blocks else None

    def store(self, prompt: TokenizedPrompt, row: int, logits: torch.Tensor) -> None:
        """Keep the prompt that `row` begins with, and the logits `(V,)` behind it, uncopied."""
        if self.max_bytes == 0 or prompt.whole_name is None:
            return
        num_full = len(prompt.block_names) * BLOCK_TOKENS
        self._add(prompt.whole_name, row, num_full, len(prompt.token_ids), logits)
        for index, name in reversed(list(enumerate(prompt.block_names))):
            start = index * BLOCK_TOKENS
            self._add(name, row, start, start + BLOCK_TOKENS, None)
        while self.size_bytes > self.max_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.size_bytes -= oldest.size_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self.size_bytes = 0

    def _add(
        self, name: bytes, row: int, start: int, stop: int, logits: torch.Tensor | None
    ) -> None:
        if name in self._blocks:
            self._blocks.move_to_end(name)
            return
        block = _Block(self._backend.read_kv(row, start, stop), logits)
        self._blocks[name] = block
        self.size_bytes += block.size_bytes
