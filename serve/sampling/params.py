"""How to draw a completion, and what the sampler must know of one that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw completions. The service validates; see `serve.rpc.validation` for the bounds.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_truncated(self) -> bool:
        """True when samples are not drawn from the distribution whose log-probability is reported.

        Then a mean of k1, k2 or k3 over the samples is no estimate of the KL. Greedy decoding is
        the extreme case: top-k with k = 1.
        """
        return (
            self.is_greedy
            or self.top_k > 0
            or self.top_p < 1.0
            or self.min_p > 0.0
            or self.repetition_penalty != 1.0
            or self.min_tokens > 0
        )


class SampledRow(Protocol):
    """A completion in the making, as the sampler sees it: a row of the logits.

    `index` and `sampling.seed` decide what is drawn. `num_top_logprobs` likeliest tokens are
    reported, log-probabilities at `logprob_temperature`. `forced_token_ids` are taken in place of
    drawn ones, if there are any.
    """

    @property
    def index(self) -> int: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def logprob_temperature(self) -> float: ...

    @property
    def num_top_logprobs(self) -> int: ...

    @property
    def forced_token_ids(self) -> tuple[int, ...] | None: ...
