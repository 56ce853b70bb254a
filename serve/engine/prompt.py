"""A prompt's tokens, and the names under which its keys and values are cached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

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
