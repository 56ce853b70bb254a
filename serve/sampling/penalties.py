"""What changes logits before they are sampled: repetition penalties and `min_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve.sampling.params import SampledRow


class LogitRules:
    """Penalties and minimum lengths of the rows of one batch.

    Keeps the index of all penalized logits on the device and adds what is new at each step.
    """

    def __init__(
        self,
        sequences: Sequence[SampledRow],
        eos_token_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self._penalized = [
            _Penalized(row, sequence, sequence.sampling.repetition_penalty)
            for row, sequence in enumerate(sequences)
            if sequence.sampling.repetition_penalty != 1.0
        ]
        # Rows of (row, token id, penalty): float64 holds the ids exactly.
        self._seen = torch.empty(0, 3, dtype=torch.float64, device=device)
        self._shortest = [
            _Shortest(row, sequence, sampling.min_tokens, eos_token_ids | sampling.stop_token_ids)
            for row, sequence in enumerate(sequences)
            if (sampling := sequence.sampling).min_tokens > 0
        ]

    def are_due(self) -> bool:
        """True while any row's next token is under a rule."""
        return bool(self._penalized) or any(s.is_too_short for s in self._shortest)

    def apply(self, logits: torch.Tensor) -> None:
        """Apply the rules in place to `(B, V)`; takes note of the tokens drawn since last time."""
        if self._penalized:
            self._penalize(logits)
        banned = [(s.row, t) for s in self._shortest if s.is_too_short for t in s.stop_token_ids]
        if banned:
            rows, ids = torch.tensor(banned, device=logits.device).T
            logits[rows, ids] = -torch.inf

    def _penalize(self, logits: torch.Tensor) -> None:
        """Penalize in place, `(B, V)`, every token of the prompts and completions.

        Keskar et al. 2019 ("CTRL", section 4.1): positive logits are divided by the penalty,
        negative ones multiplied. A token that came twice is written twice, the same.
        """
        new = [(p.row, t, p.penalty) for p in self._penalized for t in p.new_token_ids()]
        columns = torch.tensor(new, dtype=torch.float64).reshape(-1, 3)
        # Only what is in the index is taken: an allocation that fails is tried again.
        self._seen = torch.cat([self._seen, columns.to(self._seen.device)])
        for penalized in self._penalized:
            penalized.take()
        rows, ids = self._seen[:, :2].long().T
        penalties = self._seen[:, 2].float()
        values = logits[rows, ids]
        logits[rows, ids] = torch.where(values > 0, values / penalties, values * penalties)


@dataclass(slots=True)
class _Penalized:
    row: int
    sequence: SampledRow
    penalty: float
    is_prompt_taken: bool = False
    num_taken: int = 0

    def new_token_ids(self) -> list[int]:
        """Return the tokens of prompt and completion that were not taken before."""
        prompt = self.sequence.prompt_token_ids
        new = [] if self.is_prompt_taken else [*prompt]
        return new + self.sequence.token_ids[self.num_taken :]

    def take(self) -> None:
        """Remember that all tokens so far are taken."""
        self.is_prompt_taken, self.num_taken = True, len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class _Shortest:
    row: int
    sequence: SampledRow
    min_tokens: int
    stop_token_ids: frozenset[int]

    @property
    def is_too_short(self) -> bool:
        return len(self.sequence.token_ids) < self.min_tokens
