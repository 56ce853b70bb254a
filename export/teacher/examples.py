"""What is trained on and measured: prompts with completions, batched by length.

Right padding needs no mask: attention is causal, and only completion positions enter a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and a completion of it, EOS included where the model emitted it."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


def collate(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids `(B, T)`, flat positions `(N,)` that predict completions, labels `(N,)`.

    The positions come from lengths, never from token values: the pad id may equal the EOS id.
    """
    width = max(map(len, batch)) - 1
    rows: list[list[int]] = []
    positions: list[int] = []
    labels: list[int] = []
    for row, example in enumerate(batch):
        token_ids = [*example.prompt_token_ids, *example.completion_token_ids]
        start = row * width + len(example.prompt_token_ids) - 1
        positions += range(start, start + len(example.completion_token_ids))
        labels += example.completion_token_ids
        rows.append(token_ids[:-1] + [0] * (width - len(token_ids) + 1))
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(labels)


def micro_batches(
    examples: Iterable[T], max_tokens: int, length: Callable[[T], int]
) -> Iterator[list[T]]:
    """Yield the examples in batches of similar length: at most `max_tokens`, padding included."""
    batch: list[T] = []
    for example in sorted(examples, key=length):
        if batch and length(example) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(example)
    yield batch
