"""Top-k, top-p and min-p for many rows at once, and the draw from what they leave.

All three keep a prefix of the tokens in the order of falling weight (of equal ones the lower id
comes first), so a row needs its heaviest weights in order and one number: how many of them stay.
Nothing is written back to the vocabulary: the token is drawn from that prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from serve.sampling.params import SamplingParams

# How many weights are put in order at first, on the CPU: one more than top_k = 1,024 needs to be
# seen to be complete. A row whose filters leave more is ranked again, _RANKED_GROWTH times deeper.
_NUM_RANKED = 1025
_RANKED_GROWTH = 8


@dataclass(frozen=True, slots=True)
class Filters:
    """Top-k, top-p and min-p of R rows, each `(R, 1)`; a filter that is off lets everything pass.

    Each filter sees the whole distribution: top-p counts the mass that the others leave out.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> Filters:
        no_limit = torch.iinfo(torch.int64).max
        return cls(
            _column([r.top_k or no_limit for r in rows], torch.int64, device),
            _column([r.top_p if r.top_p < 1.0 else torch.inf for r in rows], torch.float64, device),
            _column([r.min_p for r in rows], torch.float64, device),
        )

    def num_kept(self, ranked: Ranked, totals: torch.Tensor) -> torch.Tensor:
        """Return how many of the ranked weights stay, `(R, 1)`; all of them may mean: and more."""
        in_top_p = 1 + torch.searchsorted(ranked.mass, self.top_p * totals)
        floors = (self.min_p * ranked.negated[:, :1]).float()
        in_min_p = torch.searchsorted(ranked.negated, floors, right=True)
        num_ranked = ranked.negated.shape[1]
        return torch.minimum(torch.minimum(in_top_p, in_min_p), self.top_k).clamp(1, num_ranked)

    def __getitem__(self, rows: torch.Tensor) -> Filters:
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def draw_truncated(
    weights: torch.Tensor,
    totals: torch.Tensor,
    filters: Filters,
    u: torch.Tensor,
    num_ranked: int = _NUM_RANKED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row from what its filters keep, by inverse CDF along the falling weights.

    Returns the tokens `(R,)` int64 and the logs of their shares of what was kept, `(R,)` float64.
    `weights` `(R, V)` float32, `totals` `(R, 1)` their sums, `u` `(R, 1)` in [0, 1), both float64.
    A token of weight 0 is never drawn. A row that holds NaN gives some token of the vocabulary.

    On the CPU the `num_ranked` heaviest weights are put in order, and more only of rows that need
    more. On CUDA all of them: the host would have to wait to learn which rows those are.
    """
    if weights.is_cuda:
        ranked = Ranked.sort(weights)
        return ranked.draw(weights, filters.num_kept(ranked, totals), u)
    ranked = Ranked.select(weights, min(num_ranked, weights.shape[1]))
    num_kept = filters.num_kept(ranked, totals)
    token_ids, logprobs = ranked.draw(weights, num_kept, u)
    rows = (num_kept[:, 0] == num_ranked).nonzero()[:, 0]
    if len(rows) > 0 and num_ranked < weights.shape[1]:
        token_ids[rows], logprobs[rows] = draw_truncated(
            weights[rows], totals[rows], filters[rows], u[rows], num_ranked * _RANKED_GROWTH
        )
    return token_ids, logprobs


@dataclass(frozen=True, slots=True)
class Ranked:
    """The K heaviest weights of each row, falling, `(R, K)`.

    `negated` are minus the weights, rising, for searches; `mass` float64 adds the weights up; `ids`
    are their tokens, where sorting gives them.
    """

    negated: torch.Tensor
    mass: torch.Tensor
    ids: torch.Tensor | None

    @classmethod
    def sort(cls, weights: torch.Tensor) -> Ranked:
        """Rank all of them, K = V, on any device and without waiting for it."""
        ranked, ids = torch.sort(weights, descending=True, stable=True)
        return cls(-ranked, ranked.cumsum(-1, dtype=torch.float64), ids)

    @classmethod
    def select(cls, weights: torch.Tensor, num_ranked: int) -> Ranked:
        """Rank the `num_ranked` heaviest, on the CPU."""
        ranked = _heaviest(weights, num_ranked)
        return cls(-ranked, ranked.cumsum(-1, dtype=torch.float64), None)

    def draw(
        self, weights: torch.Tensor, num_kept: torch.Tensor, u: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and the logs of their shares of what is kept, both `(R,)`."""
        kept_mass = self.mass.gather(1, num_kept - 1)
        rank = torch.searchsorted(self.mass, u * kept_mass, right=True)
        # Rounding may put the target behind the kept mass: take the last token with any weight.
        last = torch.searchsorted(self.mass, kept_mass)
        rank = torch.minimum(rank, last).clamp_max(self.mass.shape[1] - 1)
        weight = -self.negated.gather(1, rank)
        return self._token_ids(weights, weight, rank)[:, 0], (weight / kept_mass).log()[:, 0]

    def _token_ids(
        self, weights: torch.Tensor, weight: torch.Tensor, rank: torch.Tensor
    ) -> torch.Tensor:
        """Return the token of `weight` at `rank`, `(R, 1)`."""
        if self.ids is not None:
            return self.ids.gather(1, rank)
        num_heavier = torch.searchsorted(self.negated, -weight)
        return _nth_equal(weights, weight, rank - num_heavier)


def _heaviest(weights: torch.Tensor, num_ranked: int) -> torch.Tensor:
    """Return the `num_ranked` largest of each row in falling order, `(R, V)` -> `(R, num_ranked)`.

    By numpy, whose selection and sorting are vectorised: torch's take 10 to 20 times as long.
    """
    num_others = weights.shape[1] - num_ranked
    heaviest = np.empty((len(weights), num_ranked), np.float32)
    # Row by row, in one row's memory: it stays in the cache.
    row_weights = np.empty(weights.shape[1], np.float32)
    for row, row_heaviest in zip(weights.numpy(), heaviest, strict=True):
        row_weights[:] = row
        row_weights.partition(min(num_others, len(row) - 1))
        row_heaviest[:] = row_weights[num_others:]
    heaviest.sort(axis=-1)
    return torch.from_numpy(heaviest).flip(-1)


def _nth_equal(weights: torch.Tensor, weight: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Return where each row of `(R, V)` equals `weight` for the n-th time, from 0; all `(R, 1)`.

    On the CPU; 0 for a row of NaN, which equals nothing.
    """
    token_ids = torch.zeros_like(n)
    for row, row_weights in enumerate(weights.numpy()):
        is_equal = row_weights == float(weight[row, 0])
        nth = int(n[row, 0])
        if nth == 0:
            token_ids[row] = int(is_equal.argmax())
        elif (places := np.flatnonzero(is_equal)).size > 0:
            token_ids[row] = int(places[nth])
    return token_ids


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
