"""Whether a sequence's logits have the same bits alone, in any batch, and in chunks.

A promise of the server rests on the order in which a machine's kernels add, so it is checked on
that machine, with the model that is to be served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from serve.models.backend import Backend

Way = TypeVar("Way")

# Prompts in one block of keys, behind its end, and behind the second one
# (`serve.models.block_attention`).
_LENGTHS = (3, 40, 140, 260)
_NUM_LONG = 3  # of sequences that run at once: their rows take memory
_BATCH_SIZES = (2, 3, 4, 5, 7, 8, 13, 16, 24, 32)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A text, and what the model makes of it when it is alone."""

    token_ids: list[int]
    kv: torch.Tensor
    prompt_logits: torch.Tensor
    logits: torch.Tensor

    @property
    def prompt(self) -> list[int]:
        return self.token_ids[:-1]


def choose_way(backend: Backend, ways: Sequence[Way], take: Callable[[Way], None]) -> bool:
    """Have a backend `take` the first way of computing that `is_batch_invariant`.

    False: none of them is, and it has taken the first one, as none is better.
    """
    for way in ways:
        take(way)
        if is_batch_invariant(backend):
            return True
    take(ways[0])
    return False


def is_batch_invariant(backend: Backend) -> bool:
    """Compare prompts and decode steps in batches with those of each sequence alone.

    Overwrites the rows of the cache from 0 on; takes as long as some 1,200 tokens of prompts and 15
    steps. False means that some logit differed by at least one bit.
    """
    longest = backend.info.max_model_len - 1
    sequences = [_run_alone(backend, min(length, longest)) for length in _LENGTHS]
    max_rows = backend.info.max_num_seqs
    shortest, short, long, _ = sequences
    prompts = ([short, long, shortest], [shortest, short, short, shortest])
    return (
        all(_is_chunked_alike(backend, sequence) for sequence in (short, long))
        and all(_is_prefilled_alike(backend, batch[:max_rows]) for batch in prompts)
        and all(_is_continued_alike(backend, batch) for batch in _steps(sequences, max_rows))
    )


def _run_alone(backend: Backend, length: int) -> _Sequence:
    generator = np.random.default_rng(length)
    token_ids = generator.integers(backend.info.vocab_size, size=length + 1).tolist()
    prompt_logits = backend.forward(0, [token_ids[:-1]], [0]).clone()
    kv = backend.read_kv(0, 0, length)
    logits = backend.forward(0, [token_ids[-1:]], [length]).clone()
    return _Sequence(token_ids, kv, prompt_logits[0], logits[0])


def _steps(sequences: Sequence[_Sequence], max_rows: int) -> Iterator[list[_Sequence]]:
    """Yield batches of each size: some long sequences at the end, the others short."""
    for size in sorted({size for size in (*_BATCH_SIZES, max_rows) if size <= max_rows}):
        num_long = min(_NUM_LONG, size - 1)
        yield [*(sequences[row % 2] for row in range(size - num_long)), *sequences[4 - num_long :]]


def _is_prefilled_alike(backend: Backend, batch: Sequence[_Sequence]) -> bool:
    logits = backend.forward(0, [sequence.prompt for sequence in batch], [0] * len(batch))
    return _equal(logits, [sequence.prompt_logits for sequence in batch])


def _is_continued_alike(backend: Backend, batch: Sequence[_Sequence]) -> bool:
    """Run a step behind the keys and values of each sequence alone."""
    for row, sequence in enumerate(batch):
        backend.write_kv(row, 0, sequence.kv)
    newest = [sequence.token_ids[-1:] for sequence in batch]
    logits = backend.forward(0, newest, [len(sequence.prompt) for sequence in batch])
    return _equal(logits, [sequence.logits for sequence in batch])


def _is_chunked_alike(backend: Backend, sequence: _Sequence) -> bool:
    """Run a prompt in two passes; the second one begins in the middle of a block of keys."""
    middle = len(sequence.prompt) // 2
    if middle < 2:  # a lone token is a decode step
        return True
    backend.forward(0, [sequence.prompt[:middle]], [0])
    logits = backend.forward(0, [sequence.prompt[middle:]], [middle])
    return _equal(logits, [sequence.prompt_logits])


def _equal(logits: torch.Tensor, expected: Sequence[torch.Tensor]) -> bool:
    return all(
        bool((found == wanted).all()) for found, wanted in zip(logits, expected, strict=True)
    )
