"""What travels through an engine: requests, their sequences, the work of a step, and events.

Plain data and its rules; no queues, no gRPC; tensors are carried and not looked at. A request with
`num_samples` n is one `SequenceGroup` of n `Sequence`s that share a prompt and differ in `index`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from serve.engine.prefix_cache import TokenizedPrompt
from serve.sampling.params import SamplingParams

if TYPE_CHECKING:
    import torch

    from serve.engine.scoring import ScoringJob
    from serve.sampling.sampler import SampledBatch
    from serve.text.stop_strings import StopCheck


class FinishReason(enum.Enum):
    """Why a sequence ended: exactly one of these, once."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and what is wanted from it.

    `logprob_temperature` is the temperature at which log-probabilities are reported (1 = raw).
    `deadline_s` is on the engine's clock; `make_stop_check` builds one check per sequence, for the
    strings in `stop`.

    `client` is who takes turns with whom (see `serve.engine.waiting`).

    Requests with the same `cache_salt` share the cached beginnings of their prompts; None: this
    one neither uses the prefix cache nor enters it.

    `forced_completions` turns decoding into scoring: sample i takes these tokens instead of drawn
    ones and ends behind the last of them; `keep_logits` keeps the raw logits of each position.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    logprob_temperature: float = 1.0
    num_top_logprobs: int = 0
    deadline_s: float | None = None
    stop: tuple[str, ...] = ()
    make_stop_check: Callable[[], StopCheck] | None = None
    cache_salt: str | None = ""
    client: str = ""
    forced_completions: tuple[tuple[int, ...], ...] = ()
    keep_logits: bool = False

    def __post_init__(self) -> None:
        assert self.prompt_token_ids, "an empty prompt is refused by the service"
        assert len(self.forced_completions) in (0, self.sampling.num_samples)
        assert all(self.forced_completions), "an empty completion has nothing to score"
        assert self.logprob_temperature > 0, self.logprob_temperature


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for a slot, in the prefill step, from arrival to first token, decoding."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token of sample `index`; `position` counts completion tokens from 0.

    `logprob` is of the untruncated distribution at the request's `logprob_temperature`,
    `processed_logprob` of what the token was drawn from (see
    `serve.sampling.sampler.SampledBatch`).
    """

    index: int
    position: int
    token_id: int
    logprob: float
    processed_logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The terminal event of sample `index`: exactly one per sequence, after its last token."""

    index: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    timings: Timings
    error: str = ""
    logits: torch.Tensor | None = None
    processed_logprobs: tuple[float, ...] = ()
    num_cached_prompt_tokens: int = 0


Event = TokenEvent | FinishedEvent
EventSink = Callable[[list[Event]], None]
"""Called on the engine's thread, at most once per pass and group; must not block."""


@dataclass(slots=True)
class SequenceGroup:
    """A request while the engine works on it.

    `prompt_logits`, `(V,)`, are kept from the prefill until every sample has drawn its first token.
    `num_cached_tokens` of the prompt came from the prefix cache when its first sample started. A
    prompt is prefilled again when its early samples end before its queued ones start. `has_token`
    says that a sample has drawn one: from then on the request has its time to the first token.
    """

    request: GenerationRequest
    prompt: TokenizedPrompt
    sink: EventSink
    arrival_s: float
    num_unfinished: int
    num_unstarted: int
    prompt_logits: torch.Tensor | None = None
    num_cached_tokens: int = 0
    is_prompt_counted: bool = False
    has_token: bool = False

    @property
    def is_scoring(self) -> bool:
        return bool(self.request.forced_completions)

    def take_logits(self) -> torch.Tensor:
        """Return `prompt_logits` for one sample, and let go of them with the last."""
        logits = self.prompt_logits
        assert logits is not None, "a group's first sample is prefilled before the others fork"
        self.num_unstarted -= 1
        if self.num_unstarted == 0:
            self.prompt_logits = None
        return logits


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample in the making. Its row in the KV cache is its place in `Rows.running`.

    While it is set aside for others it has no row, and `kv` is what was in it.
    """

    group: SequenceGroup
    index: int
    stop_check: StopCheck | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    processed_logprobs: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    kv: torch.Tensor | None = None
    started_s: float = 0.0
    prefilled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    is_finished: bool = False

    @property
    def client(self) -> str:
        return self.group.request.client

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.group.request.prompt_token_ids

    @property
    def sampling(self) -> SamplingParams:
        return self.group.request.sampling

    @property
    def logprob_temperature(self) -> float:
        return self.group.request.logprob_temperature

    @property
    def num_top_logprobs(self) -> int:
        return self.group.request.num_top_logprobs

    @property
    def forced_token_ids(self) -> tuple[int, ...] | None:
        forced = self.group.request.forced_completions
        return forced[self.index] if forced else None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest sampled one."""
        return len(self.group.request.prompt_token_ids) + max(len(self.token_ids) - 1, 0)

    def append(self, token_id: int, logprob: float, processed_logprob: float) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.processed_logprobs.append(processed_logprob)

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends with the token just appended, or None while it goes on."""
        if (forced := self.forced_token_ids) is not None:
            return FinishReason.LENGTH if len(self.token_ids) == len(forced) else None
        sampling = self.group.request.sampling
        newest = self.token_ids[-1]
        if len(self.token_ids) >= sampling.min_tokens:
            if newest in sampling.stop_token_ids:
                return FinishReason.STOP
            if newest in eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
            if self.stop_check is not None and self.stop_check(self.token_ids):
                return FinishReason.STOP
        if len(self.token_ids) >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def finished_event(self, reason: FinishReason, now_s: float, error: str = "") -> FinishedEvent:
        return FinishedEvent(
            index=self.index,
            finish_reason=reason,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            timings=self._timings(now_s),
            error=error,
            logits=_stacked(self.logits),
            processed_logprobs=tuple(self.processed_logprobs),
            num_cached_prompt_tokens=self.group.num_cached_tokens,
        )

    def _timings(self, now_s: float) -> Timings:
        arrival_s = self.group.arrival_s
        if not self.started_s:
            return Timings(queue_s=now_s - arrival_s)
        queue_s = self.started_s - arrival_s
        if not self.token_ids:
            return Timings(queue_s=queue_s)
        return Timings(
            queue_s=queue_s,
            prefill_s=self.prefilled_s - self.started_s,
            ttft_s=self.first_token_s - arrival_s,
            decode_s=now_s - self.first_token_s,
        )


def make_group(request: GenerationRequest, sink: EventSink, now_s: float) -> SequenceGroup:
    num_samples = request.sampling.num_samples
    prompt = TokenizedPrompt.of(request.prompt_token_ids, request.cache_salt)
    return SequenceGroup(request, prompt, sink, now_s, num_samples, num_samples)


def make_sequences(group: SequenceGroup) -> Iterable[Sequence]:
    """Yield the group's sequences, one per sample."""
    request = group.request
    for index in range(request.sampling.num_samples):
        check = request.make_stop_check() if request.make_stop_check else None
        yield Sequence(group, index, check)


@dataclass(frozen=True, slots=True)
class RowMove:
    """The cache row `source` must be copied over `target` before the next pass."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A sequence whose prompt is entering `row`, which is none of the running ones' rows."""

    sequence: Sequence
    row: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Another token for every running sequence: sequence i is in row i."""

    phase: ClassVar[str] = "decode"
    sequences: tuple[Sequence, ...]
    started_s: float

    def expendable(self) -> tuple[SequenceGroup, ...]:
        """Return the youngest request: what ends where there is no memory for all."""
        return (max(self.sequences, key=lambda s: s.started_s).group,)


@dataclass(frozen=True, slots=True)
class SetAside:
    """A running sequence is to make way for one that must not wait for a row."""

    phase: ClassVar[str] = "prefill"
    newcomer: Sequence
    victim: Sequence
    row: int
    started_s: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """Sequences that just left the queue, by how their prompt gets into the cache.

    `prefills` run through the model in one batch, `restores` are cached as a whole, `forks` copy
    the prompt's keys and values from the row that is named beside them, `resumed` were set aside.
    Together they are `in_rows`, from `first_row` on. `long_prompts` do not run yet.
    """

    phase: ClassVar[str] = "prefill"
    first_row: int
    in_rows: tuple[Sequence, ...]
    prefills: tuple[Sequence, ...]
    restores: tuple[Sequence, ...]
    forks: tuple[tuple[Sequence, int], ...]
    resumed: tuple[Sequence, ...]
    long_prompts: tuple[LongPrompt, ...]
    started_s: float

    @property
    def started(self) -> tuple[Sequence, ...]:
        """The sequences that run for the first time, in the order of their rows."""
        return self.in_rows[: len(self.in_rows) - len(self.resumed)]

    def expendable(self) -> tuple[SequenceGroup, ...]:
        """Return all that cannot try again: the logits they need are gone."""
        return tuple(sequence.group for sequence in self.started)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a long prompt; behind the last ones its sequence runs in `target_row`."""

    phase: ClassVar[str] = "prefill"
    prompt: LongPrompt
    target_row: int
    started_s: float

    def expendable(self) -> tuple[SequenceGroup, ...]:
        return (self.prompt.sequence.group,)


@dataclass(frozen=True, slots=True)
class Score:
    """The next tokens of a scoring request."""

    phase: ClassVar[str] = "score"
    job: ScoringJob
    started_s: float

    def expendable(self) -> tuple[SequenceGroup, ...]:
        return ()


Work = Decode | SetAside | Prefill | Chunk | Score


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """There was no memory for these requests (none: for nothing that must end)."""

    groups: tuple[SequenceGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class PassResult:
    """What came of some work.

    `num_rows` went through the model, 0 where nothing did or there was no memory; the model had
    `model_s` of the time, until `ended_s`. `sequences` each drew a token, a row of `batch`.
    """

    num_rows: int = 0
    model_s: float = 0.0
    ended_s: float = 0.0
    sequences: tuple[Sequence, ...] = ()
    batch: SampledBatch | None = None
    out_of_memory: OutOfMemory | None = None


def _stacked(logits: list[torch.Tensor]) -> torch.Tensor | None:
    if not logits:
        return None
    import torch

    return torch.stack(logits)
