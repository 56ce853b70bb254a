"""Which of a model's logits are of tokens.

A head may have more rows than its tokenizer has tokens: Qwen2.5 7B has 152,064, Qwen2.5 1.5B
151,936, their tokenizer 151,665 tokens. The rows behind are padding to a round size, and what they
say means nothing. A tokenizer may also lack ids below its highest one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ABSENT_LOGIT = -1e30
"""Of an id below the highest that no token has. Its probability is 0 in float32 and float64, and a
divergence gets 0 from it: with -inf, it would be NaN."""


@dataclass(frozen=True, slots=True)
class RealTokens:
    """The ids of a tokenizer: those below `num_tokens`, without `missing_ids`, in ascending order.

    >>> RealTokens.of([0, 1, 4])
    RealTokens(num_tokens=5, missing_ids=(2, 3))
    """

    num_tokens: int
    missing_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, token_ids: Iterable[int]) -> RealTokens:
        present = set(token_ids)
        num_tokens = max(present, default=-1) + 1
        return cls(num_tokens, tuple(i for i in range(num_tokens) if i not in present))

    def within(self, num_rows: int) -> RealTokens:
        """Return those of them for which a head of `num_rows` has a row."""
        kept = tuple(i for i in self.missing_ids if i < num_rows)
        return RealTokens(min(self.num_tokens, num_rows), kept)

    def cut(self, logits: Tensor) -> Tensor:
        """Return the logits of tokens alone, `(N, rows)` -> `(N, num_tokens)`.

        A view, unless ids are missing: these get `ABSENT_LOGIT`, in a copy.
        """
        import torch

        of_tokens = logits[:, : self.num_tokens]
        if not self.missing_ids:
            return of_tokens
        missing = torch.tensor(self.missing_ids, device=logits.device)
        return of_tokens.index_fill(-1, missing, max(ABSENT_LOGIT, torch.finfo(logits.dtype).min))


EVERY_ROW = RealTokens(sys.maxsize)
"""Whatever rows a head has: of a model without a tokenizer."""
