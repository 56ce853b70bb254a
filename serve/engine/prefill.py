"""Prompts into rows of the cache: in one batch, chunk by chunk, or from the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve.engine.prefix_cache import PrefixCache
from serve.engine.prompt import TokenizedPrompt
from serve.models.backend import Backend, is_out_of_memory


@dataclass(slots=True, eq=False)
class PromptEntry:
    """A prompt on its way into `row`: so many of its tokens are there, so many were cached.

    `logits`, `(V,)`, are those behind the prompt; None until it is complete. Of `is_finite` False
    some of its keys and values are NaN.
    """

    prompt: TokenizedPrompt
    row: int
    num_entered: int = 0
    num_cached: int = 0
    logits: torch.Tensor | None = None
    is_finite: bool = True


class Prefiller:
    """Runs prompts through `backend`, at most `max_tokens` of them in one pass."""

    def __init__(self, backend: Backend, prefix_cache: PrefixCache, max_tokens: int) -> None:
        self.backend = backend
        self._cache = prefix_cache
        self._max_tokens = max_tokens

    def count_cached(self, prompt: TokenizedPrompt) -> int:
        """Return how many leading tokens need not be computed; all of them: nor the logits."""
        return self._cache.count_cached(prompt)

    def begin(self, prompt: TokenizedPrompt, row: int) -> PromptEntry:
        """Restore into `row` what is cached of the prompt."""
        num_cached, logits = self._cache.restore(prompt, row)
        return PromptEntry(prompt, row, num_cached, num_cached, logits)

    def advance(self, entry: PromptEntry, max_tokens: int | None = None) -> None:
        """Run the next chunk, of `max_tokens`, of a prompt that is not complete.

        What fails changes nothing, and may be tried again.
        """
        assert entry.logits is None, "the prompt is complete"
        token_ids = entry.prompt.token_ids
        start = entry.num_entered
        stop = start + chunk_size(len(token_ids) - start, max_tokens or self._max_tokens)
        logits = self.backend.forward(entry.row, [token_ids[start:stop]], [start])
        # Whatever is NaN in front of a token makes its logits NaN.
        entry.is_finite &= bool(logits.isfinite().all())
        if stop == len(token_ids):
            entry.logits = self._keep(entry.prompt, entry.row, logits[0])
        entry.num_entered = stop

    def run_batch(self, first_row: int, prompts: Sequence[TokenizedPrompt]) -> list[PromptEntry]:
        """Run whole prompts in one pass into the rows from `first_row` on."""
        token_ids = [prompt.token_ids for prompt in prompts]
        logits = self.backend.forward(first_row, token_ids, [0] * len(prompts))
        return [
            PromptEntry(prompt, row, len(prompt.token_ids), 0, self._keep(prompt, row, row_logits))
            for row, (prompt, row_logits) in enumerate(zip(prompts, logits, strict=True), first_row)
        ]

    def _keep(self, prompt: TokenizedPrompt, row: int, logits: torch.Tensor) -> torch.Tensor:
        """Cache a complete prompt; returns logits that outlive the backend's next pass."""
        kept = logits.clone()
        if not bool(kept.isfinite().all()):
            return kept
        try:
            self._cache.store(prompt, row, kept)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._cache.clear()
        return kept


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
