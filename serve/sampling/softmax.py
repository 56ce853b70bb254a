"""Softmax over the vocabulary, and what is searched in it: argmax, inverse CDF, single blocks.

The work is bound by memory: what is summed or searched is so block by block, in one read, and
everything behind it looks at two short rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 256
# Passes over the vocabulary follow one another within so many bytes of rows per core: its cache.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Softmax:
    """Rows of softmax(logits / temperature), by torch's fused kernel.

    `logits` and `probabilities` are `(B, V)` float32, `divisors` `(B, 1)` temperatures or None,
    `block_sums` `(B, blocks)` float64. The kernel's rows add up to 1 within a few float32 roundings
    only; everything here divides by the sum of `block_sums`, which takes that error out again.
    """

    logits: torch.Tensor
    divisors: torch.Tensor | None
    probabilities: torch.Tensor
    block_sums: torch.Tensor

    @classmethod
    def of(
        cls, logits: torch.Tensor, divisors: torch.Tensor | None, *, out: torch.Tensor
    ) -> Softmax:
        """Compute it into `out`, `(B, V)` float32 and contiguous."""
        num_rows = _chunk_rows(logits)
        sums = []
        for first in range(0, len(logits), num_rows):
            chunk = slice(first, first + num_rows)
            tempered = logits[chunk]
            if divisors is not None:
                # Into `out` as well: the CPU's kernel reads a value before it overwrites it.
                memory = None if logits.is_cuda else out[chunk]
                tempered = torch.div(tempered, divisors[chunk], out=memory)
            sums.append(block_sums_of(torch.softmax(tempered, -1, out=out[chunk])))
        return cls(logits, divisors, out, sums[0] if len(sums) == 1 else torch.cat(sums))

    def totals(self) -> torch.Tensor:
        """Return the sums of the probabilities, `(B, 1)` float64."""
        return self.block_sums.sum(-1, keepdim=True)

    def logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities at `token_ids`, `(B, n)` -> `(B, n)` float64.

        That of a likely token, plus the difference of logits: so tokens whose float32 probability
        is 0 get theirs, too. NaN where a logit is NaN or +inf.
        """
        likely_ids, likely_logprobs = self._likely()
        return self._tempered_at(token_ids) - self._tempered_at(likely_ids) + likely_logprobs

    def _likely(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return per row a token `(B, 1)` and its log-probability `(B, 1)` float64.

        The likeliest of the heaviest block: its probability is far from underflow.
        """
        heaviest = self.block_sums.argmax(-1, keepdim=True)
        probability, offset = take_blocks(self.probabilities, heaviest, 0.0).max(-1, keepdim=True)
        return heaviest * BLOCK + offset, (probability.double() / self.totals()).log()

    def _tempered_at(self, token_ids: torch.Tensor) -> torch.Tensor:
        picked = self.logits.gather(-1, token_ids)
        return (picked if self.divisors is None else picked / self.divisors).double()


def _chunk_rows(logits: torch.Tensor) -> int:
    """Return how many rows are worked on at a time: all of them on CUDA."""
    if logits.is_cuda:
        return max(len(logits), 1)
    return max(_CHUNK_BYTES // (4 * logits.shape[1]), 1) * torch.get_num_threads()


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first of the largest logits per row, `(B, V)` -> `(B,)`."""
    if logits.is_cuda:
        return logits.argmax(-1)
    # By numpy: torch's own is not vectorised on the CPU and takes ten times as long.
    return torch.from_numpy(logits.numpy().argmax(-1))


def inverse_cdf(weights: torch.Tensor, block_sums: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return per row the first token whose cumulative weight exceeds u times the total.

    `weights` `(B, V)`, their `block_sums`, `u` `(B,)` in [0, 1) -> `(B,)`. A token of weight 0 is
    never drawn. A row that holds NaN gives some token of the vocabulary.
    """
    block_cdf = block_sums.cumsum(-1)
    target = (u * block_cdf[:, -1])[:, None]
    block = torch.searchsorted(block_cdf, target, right=True).clamp_max(block_cdf.shape[1] - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    chosen = take_blocks(weights, block, 0.0).double()
    offset = torch.searchsorted(chosen.cumsum(-1), target - before, right=True)
    # Rounding may put the target behind the block's end: take the last token with any weight.
    last = BLOCK - 1 - (chosen > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    drawn = block * BLOCK + torch.minimum(offset, last)
    return drawn[:, 0].clamp_max(weights.shape[1] - 1)


def per_block(x: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Reduce `(B, V)` to `(B, blocks)`; the last block may be shorter."""
    num_whole, rest = divmod(x.shape[-1], BLOCK)
    reduced = reduce(x[:, : num_whole * BLOCK].unflatten(-1, (num_whole, BLOCK)))
    if rest == 0:
        return reduced
    return torch.cat([reduced, reduce(x[:, None, -rest:])], -1)


def maxima(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.amax(-1)


def block_sums_of(weights: torch.Tensor) -> torch.Tensor:
    # Float32 within a block is as exact as the weights are: torch adds 256 numbers by cascades.
    return per_block(weights, lambda blocks: blocks.sum(-1)).double()


def take_blocks(x: torch.Tensor, blocks: torch.Tensor, fill: float) -> torch.Tensor:
    """Return `blocks` `(B, n)` of each row, `(B, n * BLOCK)`, with `fill` behind the row's end."""
    offsets = torch.arange(BLOCK, device=x.device)
    index = (blocks[:, :, None] * BLOCK + offsets).flatten(1)
    vocab_size = x.shape[-1]
    if vocab_size % BLOCK == 0:
        return x.gather(-1, index)
    return x.gather(-1, index.clamp_max(vocab_size - 1)).masked_fill_(index >= vocab_size, fill)
