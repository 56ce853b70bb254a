"""One batched pass from logits to tokens and their log-probabilities.

A sample depends on its seed, its index and its position alone, never on what else is in the batch:
each row draws by inverse CDF from one uniform of a counter-based generator
(`serve.sampling.uniforms`). `serve.sampling.penalties` edits logits, `serve.sampling.truncation`
draws from what filters keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from serve.sampling.params import SampledRow, SamplingParams
from serve.sampling.penalties import LogitRules
from serve.sampling.softmax import (
    BLOCK,
    Softmax,
    argmax,
    inverse_cdf,
    maxima,
    per_block,
    take_blocks,
)
from serve.sampling.truncation import Filters, draw_truncated
from serve.sampling.uniforms import uniform_keys, uniforms_at

# Scoring normalizes so many rows in one buffer that it uses again for the next ones.
_SCORED_ROWS = 16


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """What one pass drew, row by row.

    `logprobs` are of the untruncated distribution at the row's `logprob_temperature`, in nats;
    `processed_logprobs` of the one that was drawn from: penalized, at the sampling temperature,
    truncated and renormalized. These are 0 where greedy; where a token was forced 0 if it had been
    drawn, too, else -inf.
    `is_finite` is False where the row's logits held NaN or +inf: its token means nothing.
    """

    token_ids: list[int]
    logprobs: list[float]
    processed_logprobs: list[float]
    is_finite: list[bool]
    top_logprobs: list[tuple[tuple[int, float], ...]]


@dataclass(frozen=True, slots=True)
class RowParameters:
    """What the sampler knows of B rows for as long as these sequences run in this order.

    `temperatures` (1 where greedy) and `logprob_temperatures` are `(B, 1)` float32, or None where
    all are 1; `is_on_basis` says that they are equal. `uniform_keys` are `(B,)`, and so is
    `is_greedy`, None unless some rows are greedy and some are not.
    `filters` are those of the `truncated_rows` `(R,)`; both None where nothing is truncated.
    """

    sequences: tuple[SampledRow, ...]
    rules: LogitRules
    temperatures: torch.Tensor | None
    logprob_temperatures: torch.Tensor | None
    is_on_basis: bool
    uniform_keys: NDArray[np.uint64]
    num_greedy: int
    is_greedy: torch.Tensor | None
    truncated_rows: torch.Tensor | None
    filters: Filters | None
    forced: tuple[tuple[int, tuple[int, ...]], ...]
    num_top_logprobs: tuple[int, ...]

    @classmethod
    def of(
        cls, sequences: Sequence[SampledRow], eos_token_ids: frozenset[int], device: torch.device
    ) -> RowParameters:
        params = [s.sampling for s in sequences]
        temperatures = [p.temperature or 1.0 for p in params]
        logprob_temperatures = [s.logprob_temperature for s in sequences]
        num_greedy = sum(p.is_greedy for p in params)
        is_mixed = 0 < num_greedy < len(params)
        truncated = [i for i, p in enumerate(params) if _has_filter(p)]
        return cls(
            sequences=tuple(sequences),
            rules=LogitRules(sequences, eos_token_ids, device),
            temperatures=_divisors(temperatures, device),
            logprob_temperatures=_divisors(logprob_temperatures, device),
            is_on_basis=temperatures == logprob_temperatures,
            uniform_keys=uniform_keys([p.seed for p in params], [s.index for s in sequences]),
            num_greedy=num_greedy,
            is_greedy=torch.tensor([p.is_greedy for p in params], device=device)
            if is_mixed
            else None,
            truncated_rows=torch.tensor(truncated, device=device) if truncated else None,
            filters=Filters.of([params[i] for i in truncated], device) if truncated else None,
            forced=tuple((i, f) for i, s in enumerate(sequences) if (f := s.forced_token_ids)),
            num_top_logprobs=tuple(s.num_top_logprobs for s in sequences),
        )

    def uniforms(self, device: torch.device) -> torch.Tensor:
        """Return this step's uniforms, `(B,)` float64."""
        u = uniforms_at(self.uniform_keys, [len(s.token_ids) for s in self.sequences])
        return torch.from_numpy(u).to(device)

    def force(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return the draws `(B,)`, those of sequences that are being scored replaced by theirs."""
        if not self.forced:
            return drawn
        now = [(row, ids[len(self.sequences[row].token_ids)]) for row, ids in self.forced]
        rows, token_ids = torch.tensor(now, device=drawn.device).T
        return drawn.index_copy(0, rows, token_ids)


def _has_filter(params: SamplingParams) -> bool:
    is_filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return is_filtered and not params.is_greedy


def _divisors(temperatures: Sequence[float], device: torch.device) -> torch.Tensor | None:
    if all(t == 1.0 for t in temperatures):
        return None
    return torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]


class Sampler:
    """Samples step after step, and keeps between steps what lasts: parameters and buffers.

    New buffers of this size would come from the operating system, page by page, at every step.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._rows: RowParameters | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def sample(self, logits: torch.Tensor, sequences: Sequence[SampledRow]) -> SampledBatch:
        """Draw the next token of each sequence from its row of `logits`, `(B, V)` float32.

        No row draws a stop token before its `min_tokens`.
        """
        assert logits.shape[0] == len(sequences), (logits.shape, len(sequences))
        rows = self._parameters(tuple(sequences), logits.device)
        processed = logits
        if rows.rules.are_due():
            processed = self._buffer("processed", logits).copy_(logits)
            rows.rules.apply(processed)
        softmax = on_basis = self._softmax("softmax", processed, rows.temperatures)
        if processed is not logits or not rows.is_on_basis:
            on_basis = self._softmax("on basis", logits, rows.logprob_temperatures)
        return _sample(softmax, on_basis, rows)

    def forget(self) -> None:
        """Let go of the last sequences, and of the logits that they hold."""
        self._rows = None

    def _parameters(self, sequences: tuple[SampledRow, ...], device: torch.device) -> RowParameters:
        if self._rows is None or self._rows.sequences != sequences:
            self._rows = RowParameters.of(sequences, self._eos_token_ids, device)
        return self._rows

    def _softmax(self, name: str, logits: torch.Tensor, divisors: torch.Tensor | None) -> Softmax:
        return Softmax.of(logits, divisors, out=self._buffer(name, logits))

    def _buffer(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        """Return memory like `logits`, the same for the same name; it grows with the batch."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(logits) or buffer.shape[1:] != logits.shape[1:]:
            buffer = self._buffers[name] = torch.empty_like(
                logits, memory_format=torch.contiguous_format
            )
        return buffer[: len(logits)]


def _sample(softmax: Softmax, on_basis: Softmax, rows: RowParameters) -> SampledBatch:
    drawn = _draw(softmax, rows)
    token_ids = rows.force(drawn.token_ids)
    logprobs = on_basis.logprobs(token_ids[:, None])[:, 0]
    columns = [token_ids.double(), logprobs]
    if rows.forced:
        columns.append((token_ids == drawn.token_ids).double())
    if rows.num_greedy < len(rows.sequences):
        columns.append(_processed_logprobs(drawn, softmax, on_basis, logprobs, rows))
    if num_top := max(rows.num_top_logprobs):
        columns += _top_logprobs(on_basis, num_top)
    # The one moment when the host waits for the device.
    return _batch(torch.stack(columns).tolist(), rows)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log softmax(logits / temperature) at `token_ids`: `(N, V)`, `(N,)` -> `(N,)` float64.

    The same bits as `Sampler.sample` reports.
    """
    buffer = torch.empty_like(logits[:_SCORED_ROWS])
    scored = []
    for chunk, ids in zip(logits.split(_SCORED_ROWS), token_ids.split(_SCORED_ROWS), strict=True):
        divisors = _divisors([temperature] * len(chunk), logits.device)
        softmax = Softmax.of(chunk, divisors, out=buffer[: len(chunk)])
        scored.append(softmax.logprobs(ids[:, None])[:, 0])
    return torch.cat(scored)


def _batch(columns: list[list[float]], rows: RowParameters) -> SampledBatch:
    """Take the columns that `_sample` stacked apart, each `(B,)`."""
    num_rows = len(rows.sequences)
    logprobs, rest = columns[1], columns[2:]
    is_drawn = rest.pop(0) if rows.forced else []
    processed_logprobs = [0.0] * num_rows
    if rows.num_greedy < num_rows:
        processed_logprobs = rest.pop(0)
    for row, _ in rows.forced:
        processed_logprobs[row] = 0.0 if is_drawn[row] else -math.inf
    tops = list(zip(*rest, strict=True)) or [()] * num_rows
    return SampledBatch(
        [int(t) for t in columns[0]],
        logprobs,
        processed_logprobs,
        [math.isfinite(p) for p in logprobs],
        [_pairs(top, count) for top, count in zip(tops, rows.num_top_logprobs, strict=True)],
    )


def _pairs(top: tuple[float, ...], count: int) -> tuple[tuple[int, float], ...]:
    """Return the first `count` of the (id, log-probability) pairs that stand in a row."""
    return tuple((int(top[2 * i]), top[2 * i + 1]) for i in range(min(count, len(top) // 2)))


@dataclass(frozen=True, slots=True)
class _Draws:
    """Tokens `(B,)`, and the log-probabilities `(R,)` of the truncated rows' draws."""

    token_ids: torch.Tensor
    truncated_logprobs: torch.Tensor | None = None


def _draw(softmax: Softmax, rows: RowParameters) -> _Draws:
    """Draw a token per row: argmax where greedy, else inverse CDF."""
    num_rows = len(rows.sequences)
    if rows.num_greedy == num_rows:
        return _Draws(argmax(softmax.logits))
    device = softmax.logits.device
    u = rows.uniforms(device)
    truncated_logprobs = None
    if rows.truncated_rows is None or len(rows.truncated_rows) < num_rows:
        token_ids = inverse_cdf(softmax.probabilities, softmax.block_sums, u)
    else:
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    if rows.is_greedy is not None:
        token_ids = torch.where(rows.is_greedy, argmax(softmax.logits), token_ids)
    if rows.truncated_rows is not None and rows.filters is not None:
        which = rows.truncated_rows
        is_all = len(which) == num_rows
        weights = softmax.probabilities if is_all else softmax.probabilities[which]
        token_ids[which], truncated_logprobs = draw_truncated(
            weights, softmax.totals()[which], rows.filters, u[which, None]
        )
    return _Draws(token_ids, truncated_logprobs)


def _processed_logprobs(
    drawn: _Draws,
    softmax: Softmax,
    on_basis: Softmax,
    logprobs: torch.Tensor,
    rows: RowParameters,
) -> torch.Tensor:
    """Return the log-probabilities of the draws under what they were drawn from, `(B,)`."""
    if softmax is on_basis:
        processed = logprobs.clone()
    else:
        processed = softmax.logprobs(drawn.token_ids[:, None])[:, 0]
    if rows.truncated_rows is not None and drawn.truncated_logprobs is not None:
        processed[rows.truncated_rows] = drawn.truncated_logprobs
    return processed if rows.is_greedy is None else processed.masked_fill_(rows.is_greedy, 0.0)


def _top_logprobs(softmax: Softmax, count: int) -> list[torch.Tensor]:
    """Return the `count` likeliest tokens: ids and log-probabilities by turns, each `(B,)`.

    The largest logits lie in the blocks with the largest maxima.
    """
    logits = softmax.logits
    largest = per_block(logits, maxima)
    blocks = largest.topk(min(count, largest.shape[1])).indices
    offsets = take_blocks(logits, blocks, -torch.inf).topk(min(count, logits.shape[1])).indices
    ids = blocks.gather(-1, offsets // BLOCK) * BLOCK + offsets % BLOCK
    ids.clamp_max_(logits.shape[1] - 1)
    columns = torch.stack([ids.double(), softmax.logprobs(ids)], -1).flatten(1)
    return list(columns.unbind(-1))
