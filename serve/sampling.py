"""One batched pass from logits to tokens and their log-probabilities.

A sample depends on its seed, its index and its position alone, never on what else is in the batch:
each row draws by inverse CDF from one uniform of a counter-based generator.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from serve.sequence import Sequence

# The vocabulary is summed block by block, so that the inverse CDF reads two short rows and no
# cumulative sum over the whole vocabulary is ever written.
_CDF_BLOCK = 256


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
    tempered = _temper(processed, [r.sampling.temperature for r in requests])
    weights, max_logit = _softmax_weights(tempered)
    token_ids = _force(_draw(weights, tempered, sequences), sequences)

    if processed is logits and all(_is_on_basis(s) for s in sequences):
        logprobs = _logprobs(tempered, max_logit, weights, token_ids)
    else:
        on_basis = _temper(logits, [r.logprob_temperature for r in requests])
        weights, max_logit = _softmax_weights(on_basis)
        logprobs = _logprobs(on_basis, max_logit, weights, token_ids)
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

    logit − logsumexp; no full log-softmax is written.
    """
    tempered = logits if temperature == 1.0 else logits / temperature
    weights, max_logit = _softmax_weights(tempered)
    return _logprobs(tempered, max_logit, weights, token_ids)


def _is_on_basis(sequence: Sequence) -> bool:
    request = sequence.group.request
    sampling = request.sampling
    drawn_at = 1.0 if sampling.is_greedy else sampling.temperature
    return drawn_at == request.logprob_temperature


def _temper(logits: torch.Tensor, temperatures: SequenceOf[float]) -> torch.Tensor:
    """Divide each row by its temperature; greedy rows (0) stay as they are."""
    divisors = [t if t > 0 else 1.0 for t in temperatures]
    if all(d == 1.0 for d in divisors):
        return logits
    return logits / torch.tensor(divisors, dtype=torch.float32, device=logits.device)[:, None]


def _softmax_weights(tempered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp(x − max) `(B, V)` and the max `(B, 1)`: unnormalised probabilities."""
    max_logit = tempered.amax(-1, keepdim=True)
    return torch.sub(tempered, max_logit).exp_(), max_logit


def _logprobs(
    tempered: torch.Tensor, max_logit: torch.Tensor, weights: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    chosen = tempered.gather(-1, token_ids[:, None]).double() - max_logit.double()
    return (chosen - weights.sum(-1, keepdim=True, dtype=torch.float64).log())[:, 0]


def _draw(
    weights: torch.Tensor, tempered: torch.Tensor, sequences: SequenceOf[Sequence]
) -> torch.Tensor:
    """Return a token per row, `(B,)` int64: argmax where greedy, else inverse CDF."""
    samplings = [s.group.request.sampling for s in sequences]
    if all(p.is_greedy for p in samplings):
        return tempered.argmax(-1)
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in samplings):
        weights = weights * _kept(weights, sequences)
    u = uniforms(
        [p.seed for p in samplings],
        [s.index for s in sequences],
        [len(s.token_ids) for s in sequences],
    )
    drawn = _inverse_cdf(weights, torch.from_numpy(u).to(weights.device))
    if any(p.is_greedy for p in samplings):
        is_greedy = torch.tensor([p.is_greedy for p in samplings], device=weights.device)
        drawn = torch.where(is_greedy, tempered.argmax(-1), drawn)
    return drawn


def _force(drawn: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Replace the draws of sequences that are being scored by the tokens they are forced to."""
    for row, sequence in enumerate(sequences):
        if (forced := sequence.forced_token_ids) is not None:
            drawn[row] = forced[len(sequence.token_ids)]
    return drawn


def _inverse_cdf(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return per row the first token whose cumulative weight exceeds u times the total.

    `weights` `(B, V)`, `u` `(B,)` in [0, 1) -> `(B,)`. A token of weight 0 is never drawn.
    """
    vocab_size = weights.shape[-1]
    padded = torch.nn.functional.pad(weights, (0, -vocab_size % _CDF_BLOCK))
    blocks = padded.view(len(weights), -1, _CDF_BLOCK)
    block_cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (u * block_cdf[:, -1])[:, None]
    block = torch.searchsorted(block_cdf, target, right=True).clamp_max(blocks.shape[1] - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    chosen = blocks.gather(1, block[..., None].expand(-1, -1, _CDF_BLOCK))[:, 0].double()
    offset = torch.searchsorted(chosen.cumsum(-1), target - before, right=True)
    # Rounding may put the target behind the block's end: take the last token with any weight.
    last = _CDF_BLOCK - 1 - (chosen > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return (block * _CDF_BLOCK + torch.minimum(offset, last))[:, 0]


def _kept(weights: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """Return the mask `(B, V)` of tokens that survive each row's top-k, top-p and min-p."""
    samplings = [s.group.request.sampling for s in sequences]
    vocab_size = weights.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=weights.dtype, device=weights.device)[:, None]

    top_k = column([float(p.top_k or vocab_size) for p in samplings])
    top_p = column([p.top_p for p in samplings])
    min_p = column([p.min_p for p in samplings])
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered / ordered.sum(-1, keepdim=True)
    mass_before = probabilities.cumsum(-1) - probabilities
    rank = torch.arange(vocab_size, device=weights.device)
    keep = (rank < top_k) & (mass_before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


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
