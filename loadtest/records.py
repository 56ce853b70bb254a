"""What is sent and what was seen of it: the plain data that all of `loadtest` shares.

Times are seconds on the run's own clock: 0 is its start, the same for all client processes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Phase(enum.Enum):
    """Whether a request counts."""

    WARMUP = "warmup"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class DatasetPrompt:
    """One prompt of a dataset, sent as a user message.

    `reference_answer` is canonical under `estimators.canonical.canonicalise`; `answer_format` names
    the extractor ("none": there is nothing to judge). `max_tokens` None: the run's own.
    `ignore_eos`: every sample is `max_tokens` long, whatever the model says.
    """

    prompt_id: str
    text: str
    reference_answer: str | None = None
    answer_format: str = "none"
    max_tokens: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a schedule.

    In closed loops `intended_s` and `rate_rps` are None: a request is sent when one of
    `concurrency` workers is free. Requests of the same `pair` (prompt, seed, place in their block)
    differ in their arm alone.
    """

    number: int
    arm: str
    rate_rps: float | None
    block: int
    pair: int
    prompt_id: str
    seed: int
    phase: Phase
    intended_s: float | None
    concurrency: int | None = None

    @property
    def load(self) -> float:
        """Requests per second (open loop), or at a time (closed), per arm."""
        load = self.concurrency if self.rate_rps is None else self.rate_rps
        assert load is not None, self
        return load


@dataclass(slots=True)
class SampleRecord:
    """One completion. `token_times_s` has the arrival of each token at the client.

    `k3_sum`, `num_kl_tokens`, `exact_kl_mean` are in nats and over tokens, as in `Divergence` with
    this arm as the policy; None where no divergence is known.
    """

    index: int
    finish_reason: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    answer: str | None = None
    is_correct: bool | None = None
    k3_sum: float | None = None
    num_kl_tokens: int | None = None
    per_token_k3: list[float] = field(default_factory=list)
    exact_kl_mean: float | None = None


@dataclass(slots=True)
class RequestRecord:
    """What became of a planned request.

    `status` is the gRPC code's name ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", ...), or
    "INCOMPLETE" for a stream that ended without its last message. Latency counts from
    `intended_s` (open loop) or `sent_s` (closed loop): see `start_s`.
    """

    plan: PlannedRequest
    sent_s: float
    ended_s: float = 0.0
    status: str = ""
    error: str = ""
    num_prompt_tokens: int = 0
    samples: list[SampleRecord] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return self.status == "OK"

    @property
    def start_s(self) -> float:
        return self.sent_s if self.plan.intended_s is None else self.plan.intended_s

    @property
    def send_lag_s(self) -> float | None:
        """How late it was sent; None in a closed loop."""
        return None if self.plan.intended_s is None else self.sent_s - self.plan.intended_s

    @property
    def ttft_s(self) -> float | None:
        """To the first token of any sample; None without tokens."""
        firsts = [s.token_times_s[0] for s in self.samples if s.token_times_s]
        return min(firsts) - self.start_s if firsts else None

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.start_s

    @property
    def itls_s(self) -> list[float]:
        """Between successive tokens of each sample. Tokens that came together have 0 between."""
        return [
            later - earlier
            for sample in self.samples
            for earlier, later in zip(sample.token_times_s, sample.token_times_s[1:], strict=False)
        ]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token behind the first, mean over all samples; None below two tokens."""
        itls = self.itls_s
        return sum(itls) / len(itls) if itls else None
