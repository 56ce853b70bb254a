"""One batched pass from logits to tokens and their log-probabilities.

A sample depends on its seed, its index and its position alone, never on what else is in the batch:
each row draws by inverse CDF from one uniform of a counter-based generator.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from serve.sequence import SamplingParams, Sequence

# Sampling is bound by memory: what is summed or searched over the vocabulary is so block by block,
# in one read, and everything behind it looks at two short rows.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What one pass drew, row by row.

    `logprobs` are of the untruncated distribution at the row's `logprob_temperature`, in nats.
    `is_finite` is False where the row's logits held NaN or +inf: its token means nothing.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_finite: list[bool]
    top_logprobs: list[tuple[tuple[int, float], ...]]


def uniforms(
    seeds: SequenceOf[int], sample_indices: SequenceOf[int], positions: SequenceOf[int]
) -> NDArray[np.float64]:
    """Return one uniform in [0, 1) for each (seed, sample index, position), shape `(B,)`.

    Counter-based: three rounds of the SplitMix64 finalizer (Steele et al. 2014, "Fast splittable
    pseudorandom number generators", section 4) keyed by the triple; the top 53 bits are used.
    """
    state = _mix64(np.asarray(seeds, dtype=np.uint64))
    state = _mix64(state ^ np.asarray(sample_indices, dtype=np.uint64))
    state = _mix64(state ^ np.asarray(positions, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(
    logits: torch.Tensor, sequences: SequenceOf[Sequence], eos_token_ids: frozenset[int]
) -> SampledBatch:
    """Draw the next token of each sequence from its row of `logits`, `(B, V)` float32.

    No row draws a stop token before its `min_tokens`.
    """
    assert logits.shape[0] == len(sequences), (logits.shape, len(sequences))
    requests = [s.group.request for s in sequences]
    processed = _process(logits, sequences, eos_token_ids)
    softmax = _Softmax.of(processed, [r.sampling.temperature or 1.0 for r in requests])
    if processed is logits and all(_is_on_basis(s) for s in sequences):
        on_basis = softmax
    else:
        on_basis = _Softmax.of(logits, [r.logprob_temperature for r in requests])
    references = on_basis.references()
    # From here on the probabilities of truncated rows are overwritten.
    token_ids = _force(_draw(softmax, sequences), sequences)
    logprobs = on_basis.logprobs(token_ids, references)
    finite = torch.isfinite(logprobs)
    return SampledBatch(
        token_ids.tolist(),
        logprobs.tolist(),
        finite.tolist(),
        [_top_logprobs(logits[i], r.logprob_temperature, r.num_top_logprobs)
         for i, r in enumerate(requests)],
    )  # fmt: skip


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log softmax(logits / temperature) at `token_ids`: `(N, V)`, `(N,)` -> `(N,)` float64.

    The same bits as `sample` reports.
    """
    softmax = _Softmax.of(logits, [temperature] * len(logits))
    return softmax.logprobs(token_ids, softmax.references())


def _is_on_basis(sequence: Sequence) -> bool:
    request = sequence.group.request
    return (request.sampling.temperature or 1.0) == request.logprob_temperature


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Rows of softmax(logits / temperature), read and written once by torch's fused kernel.

    `logits` and `probabilities` are `(B, V)` float32, `divisors` `(B, 1)` temperatures or None,
    `block_sums` `(B, blocks)` float64. The kernel's rows add up to 1 within a few float32 roundings
    only; everything here divides by the sum of `block_sums`, which takes that error out again.
    """

    logits: torch.Tensor
    divisors: torch.Tensor | None
    probabilities: torch.Tensor
    block_sums: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, temperatures: SequenceOf[float]) -> _Softmax:
        divisors = None
        if any(t != 1.0 for t in temperatures):
            divisors = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[
                :, None
            ]
        tempered = logits if divisors is None else logits / divisors
        probabilities = torch.softmax(tempered, -1)
        return cls(logits, divisors, probabilities, _block_sums(probabilities))

    def references(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return per row a likely token `(B, 1)` and its log-probability `(B, 1)` float64.

        The likeliest of the heaviest block: its probability is far from underflow.
        """
        heaviest = self.block_sums.argmax(-1, keepdim=True)
        probability, offset = _block(self.probabilities, heaviest, 0.0).max(-1, keepdim=True)
        total = self.block_sums.sum(-1, keepdim=True)
        return heaviest * _BLOCK + offset, (probability.double() / total).log()

    def logprobs(
        self, token_ids: torch.Tensor, references: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Return `(B,)` float64: a reference's log-probability plus the difference of logits.

        So tokens whose float32 probability is 0 get theirs, too. NaN where a logit is NaN or +inf.
        """
        reference_ids, reference_logprobs = references
        difference = self._tempered_at(token_ids[:, None]) - self._tempered_at(reference_ids)
        return (difference + reference_logprobs)[:, 0]

    def _tempered_at(self, token_ids: torch.Tensor) -> torch.Tensor:
        picked = self.logits.gather(-1, token_ids)
        return (picked if self.divisors is None else picked / self.divisors).double()


def _draw(softmax: _Softmax, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Return a token per row, `(B,)` int64: argmax where greedy, else inverse CDF."""
    samplings = [s.group.request.sampling for s in sequences]
    if all(p.is_greedy for p in samplings):
        return _argmax(softmax.logits)
    u = uniforms(
        [p.seed for p in samplings],
        [s.index for s in sequences],
        [len(s.token_ids) for s in sequences],
    )
    _truncate(softmax, samplings)
    drawn = _inverse_cdf(
        softmax.probabilities, softmax.block_sums, torch.from_numpy(u).to(softmax.logits.device)
    )
    if any(p.is_greedy for p in samplings):
        is_greedy = torch.tensor([p.is_greedy for p in samplings], device=drawn.device)
        drawn = torch.where(is_greedy, _argmax(softmax.logits), drawn)
    return drawn


def _force(drawn: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Replace the draws of sequences that are being scored by the tokens they are forced to."""
    for row, sequence in enumerate(sequences):
        if (forced := sequence.forced_token_ids) is not None:
            drawn[row] = forced[len(sequence.token_ids)]
    return drawn


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first of the largest logits per row, `(B, V)` -> `(B,)`.

    By blocks: torch's own argmax is not vectorised on the CPU and takes 4 times as long.
    """
    block = _per_block(logits, _maxima).argmax(-1, keepdim=True)
    offset = _block(logits, block, -torch.inf).argmax(-1, keepdim=True)
    return (block * _BLOCK + offset)[:, 0]


def _inverse_cdf(weights: torch.Tensor, block_sums: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return per row the first token whose cumulative weight exceeds u times the total.

    `weights` `(B, V)`, their `block_sums`, `u` `(B,)` in [0, 1) -> `(B,)`. A token of weight 0 is
    never drawn. A row that holds NaN gives some token of the vocabulary.
    """
    block_cdf = block_sums.cumsum(-1)
    target = (u * block_cdf[:, -1])[:, None]
    block = torch.searchsorted(block_cdf, target, right=True).clamp_max(block_cdf.shape[1] - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    chosen = _block(weights, block, 0.0).double()
    offset = torch.searchsorted(chosen.cumsum(-1), target - before, right=True)
    # Rounding may put the target behind the block's end: take the last token with any weight.
    last = _BLOCK - 1 - (chosen > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    drawn = block * _BLOCK + torch.minimum(offset, last)
    return drawn[:, 0].clamp_max(weights.shape[1] - 1)


def _per_block(x: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Reduce `(B, V)` to `(B, blocks)`; the last block may be shorter."""
    num_whole, rest = divmod(x.shape[-1], _BLOCK)
    reduced = reduce(x[:, : num_whole * _BLOCK].unflatten(-1, (num_whole, _BLOCK)))
    if rest == 0:
        return reduced
    return torch.cat([reduced, reduce(x[:, None, -rest:])], -1)


def _maxima(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.amax(-1)


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    # Float32 within a block is as exact as the weights are: torch adds 256 numbers by cascades.
    return _per_block(weights, lambda blocks: blocks.sum(-1)).double()


def _block(x: torch.Tensor, block: torch.Tensor, fill: float) -> torch.Tensor:
    """Return block `block` `(B, 1)` of each row, `(B, _BLOCK)`, with `fill` behind its end."""
    index = block * _BLOCK + torch.arange(_BLOCK, device=x.device)
    vocab_size = x.shape[-1]
    return x.gather(-1, index.clamp_max(vocab_size - 1)).masked_fill_(index >= vocab_size, fill)


def _truncate(softmax: _Softmax, samplings: SequenceOf[SamplingParams]) -> None:
    """Set to 0, in place, what each row's top-k, top-p and min-p leave out."""
    rows = [i for i, p in enumerate(samplings) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    if not rows:
        return
    for row in rows:
        weights = softmax.probabilities[row]
        kept = _kept(weights, samplings[row])
        values = weights[kept]
        weights.zero_()[kept] = values
    softmax.block_sums[rows] = _block_sums(softmax.probabilities[rows])


def _kept(weights: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return the ids, by falling weight, of what top-k, top-p and min-p leave of one row `(V,)`.

    Each filter sees the whole distribution. Only candidates are sorted: a token with less than
    (1 − top_p) / V of the mass has more than top_p of it in front.
    """
    total = weights.sum(dtype=torch.float64)
    floor = max(sampling.min_p * weights.max(), (1.0 - sampling.top_p) * total / len(weights))
    if 0 < sampling.top_k < len(weights):
        floor = max(floor, weights.topk(sampling.top_k).values[-1])
    candidates = (weights >= floor).nonzero()[:, 0]
    ordered, order = weights[candidates].double().sort(descending=True, stable=True)
    candidates = candidates[order]
    if sampling.top_p < 1.0:
        mass_before = ordered.cumsum(-1).roll(1)
        mass_before[:1] = 0.0
        candidates = candidates[mass_before < sampling.top_p * total]
    return candidates[: sampling.top_k] if sampling.top_k > 0 else candidates


def _process(
    logits: torch.Tensor, sequences: SequenceOf[Sequence], eos_token_ids: frozenset[int]
) -> torch.Tensor:
    """Apply repetition penalties and `min_tokens`; returns `logits` itself when no row has any."""
    touched = [i for i, s in enumerate(sequences) if _is_penalized(s) or _is_too_short(s)]
    if not touched:
        return logits
    processed = logits.clone()
    for row in touched:
        sequence = sequences[row]
        if _is_penalized(sequence):
            _penalize(processed[row], sequence)
        if _is_too_short(sequence):
            stops = eos_token_ids | sequence.group.request.sampling.stop_token_ids
            processed[row, sorted(stops)] = -torch.inf
    return processed


def _is_penalized(sequence: Sequence) -> bool:
    return sequence.group.request.sampling.repetition_penalty != 1.0


def _is_too_short(sequence: Sequence) -> bool:
    return len(sequence.token_ids) < sequence.group.request.sampling.min_tokens


def _penalize(logits: torch.Tensor, sequence: Sequence) -> None:
    """Penalize in place, `(V,)`, every token of the prompt and completion.

    Keskar et al. 2019 ("CTRL", section 4.1): positive logits are divided by the penalty, negative
    ones multiplied.
    """
    request = sequence.group.request
    penalty = request.sampling.repetition_penalty
    seen = torch.tensor(
        sorted({*request.prompt_token_ids, *sequence.token_ids}), device=logits.device
    )
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _top_logprobs(
    logits: torch.Tensor, temperature: float, count: int
) -> tuple[tuple[int, float], ...]:
    """Return the `count` likeliest tokens of one row `(V,)` with their log-probabilities."""
    if count == 0:
        return ()
    values, ids = torch.log_softmax(logits.double() / temperature, -1).topk(count)
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
