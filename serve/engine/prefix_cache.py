"""Keys and values of prompts that came before, in blocks, so that repeating a prompt is a copy.

A block is found by the hash of everything in front of it: two prompts share the blocks of their
common beginning. A whole prompt's last, shorter block also holds the logits behind it. Blocks that
were not used for longest go first.

Restored keys are the very bits that computing them would give
(docs/decisions/001-batch-invariance.md), so a hit changes the time of an answer and nothing else.
That time is visible: only prompts with the same `cache_salt` share blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from serve.engine.prompt import BLOCK_TOKENS, TokenizedPrompt
from serve.models.backend import Backend


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
        self._max_bytes = max_bytes
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
        if self._max_bytes == 0 or prompt.whole_name is None:
            return
        num_full = len(prompt.block_names) * BLOCK_TOKENS
        self._add(prompt.whole_name, row, num_full, len(prompt.token_ids), logits)
        for index, name in reversed(list(enumerate(prompt.block_names))):
            start = index * BLOCK_TOKENS
            self._add(name, row, start, start + BLOCK_TOKENS, None)
        while self.size_bytes > self._max_bytes:
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
