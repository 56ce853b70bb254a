"""Teacher-forced log-probabilities: what a model thinks of tokens that somebody else chose.

Two ways. One pass over prompt and completion is fast. Where the kernels of a pass and of a decode
step round differently, and int8 activations blow the difference up to whole nats, the completion
is decoded token by token instead, forced; then the scores are the bits that decoding would give.
`measure_noise_floor` tells which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from serve.engine.prefix_cache import TokenizedPrompt
from serve.engine.sequence import Event, FinishedEvent, FinishReason, GenerationRequest
from serve.errors import EngineFailedError, EngineStoppedError
from serve.models.backend import Backend
from serve.sampling.params import SamplingParams
from serve.sampling.sampler import token_logprobs
from serve.sampling.softmax import argmax

if TYPE_CHECKING:
    from serve.engine.runner import Prefiller, PromptEntry


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Completions of one prompt to be scored at `temperature`; none of them is empty.

    `with_logits` also returns the raw logits of every completion position.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    temperature: float = 1.0
    with_logits: bool = False
    deadline_s: float | None = None
    cache_salt: str | None = ""
    client: str = ""

    def __post_init__(self) -> None:
        assert self.prompt_token_ids and all(self.completions), "nothing to score"


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """Of one completion of T tokens: `logprobs` `(T,)` float64 in nats, at the request's
    temperature and untruncated; `is_greedy` `(T,)` bool, whether temperature 0 takes this token,
    None where another server did not say; `logits` `(T, V)` float32, raw, only when asked for."""

    logprobs: NDArray[np.float64]
    is_greedy: NDArray[np.bool_] | None = None
    logits: NDArray[np.float32] | None = None


def uncancellable_future() -> Future[list[ScoredCompletion]]:
    """Return a future that the engine alone resolves; `Engine.cancel` is how to give up on it.

    Its `cancel` returns False. Otherwise another thread's cancel could come between any check and
    `set_result`, which would then raise in the middle of a step.
    """
    future: Future[list[ScoredCompletion]] = Future()
    future.set_running_or_notify_cancel()
    return future


class ScoringJob:
    """A scoring request under way: the prompt once, then the completions, a chunk per step.

    The longest completions come first, so that those which end leave the last rows. The last token
    of a completion is not fed: nothing that is asked for depends on it.
    """

    def __init__(self, request: ScoringRequest) -> None:
        self.request = request
        self.future = uncancellable_future()
        lengths = [len(completion) for completion in request.completions]
        self._order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self._prompt: PromptEntry | None = None
        self._batch: list[_PartlyScored] = []
        self._scored: dict[int, ScoredCompletion] = {}
        self._has_nan = False

    @property
    def is_begun(self) -> bool:
        return self._prompt is not None

    @property
    def is_finite(self) -> bool:
        """Whether the rows that it works in are free of NaN."""
        return not self._has_nan and (self._prompt is None or self._prompt.is_finite)

    @property
    def is_done(self) -> bool:
        return len(self._scored) == len(self.request.completions)

    @property
    def scored(self) -> list[ScoredCompletion]:
        """What a job that is done found out, in the order of the request."""
        return [self._scored[index] for index in range(len(self.request.completions))]

    def finish(self) -> None:
        """Tell whoever asked what the job, which is done, found out."""
        self.future.set_result(self.scored)

    def fail(self, reason: FinishReason, error: str) -> None:
        """Tell whoever asked why the job came to nothing."""
        self.future.set_exception(scoring_error(reason, error))

    def advance(self, prefiller: Prefiller, first_row: int, num_rows: int, max_tokens: int) -> None:
        """Run one pass of at most `max_tokens` in the `num_rows` cache rows from `first_row` on.

        A pass that fails may be tried again, also with fewer tokens.
        """
        if self._prompt is None:
            prompt = TokenizedPrompt.of(self.request.prompt_token_ids, self.request.cache_salt)
            self._prompt = prefiller.begin(prompt, first_row)
        if self._prompt.logits is None:
            prefiller.advance(self._prompt, max_tokens)
            return
        if not self._batch:
            self._begin_batch(prefiller.backend, self._prompt.logits, first_row, num_rows)
        self._advance_batch(prefiller.backend, first_row, max_tokens)
        while self._batch and self._batch[-1].is_done:
            scored = self._batch.pop()
            self._scored[scored.index] = scored.result()

    def _begin_batch(
        self, backend: Backend, prompt_logits: torch.Tensor, first_row: int, num_rows: int
    ) -> None:
        """Put the prompt in front of the next completions, and score their first tokens."""
        indices = self._order[len(self._scored) : len(self._scored) + num_rows]
        num_prompt_tokens = len(self.request.prompt_token_ids)
        for row, index in enumerate(indices, first_row):
            if self._has_nan:  # of an earlier completion
                backend.scrub_kv(row, num_prompt_tokens)
            if row > first_row:
                backend.copy_kv(first_row, row, num_prompt_tokens)
            scored = _PartlyScored(index, self.request.completions[index])
            scored.add(self._read(prompt_logits[None], scored.token_ids[:1]))
            self._batch.append(scored)

    def _advance_batch(self, backend: Backend, first_row: int, max_tokens: int) -> None:
        """Feed each unfinished completion its next tokens: one that is done is none of them."""
        batch = [scored for scored in self._batch if not scored.is_done]
        if not batch:
            return
        num_tokens = max(max_tokens // len(batch), 1)
        fed = [s.token_ids[s.num_scored - 1 : -1][:num_tokens] for s in batch]
        num_cached = [len(self.request.prompt_token_ids) + s.num_scored - 1 for s in batch]
        logits = backend.forward(first_row, fed, num_cached, [range(len(ids)) for ids in fed])
        parts = logits.split([len(ids) for ids in fed])
        for scored, ids, part in zip(batch, fed, parts, strict=True):
            predicted = scored.token_ids[scored.num_scored :][: len(ids)]
            scored.add(self._read(part, predicted))

    def _read(self, logits: torch.Tensor, token_ids: Sequence[int]) -> ScoredCompletion:
        """Return what `logits`, `(N, V)`, say of the `N` tokens that came."""
        ids = torch.tensor(token_ids, device=logits.device)
        logprobs = token_logprobs(logits, ids, self.request.temperature).cpu().numpy()
        self._has_nan |= bool(np.isnan(logprobs).any())
        return ScoredCompletion(
            logprobs,
            (argmax(logits) == ids).cpu().numpy(),
            logits.cpu().numpy().copy() if self.request.with_logits else None,
        )


class _PartlyScored:
    """A completion of whose tokens the first `num_scored` have their log-probabilities."""

    def __init__(self, index: int, token_ids: tuple[int, ...]) -> None:
        self.index = index
        self.token_ids = token_ids
        self.num_scored = 0
        self._parts: list[ScoredCompletion] = []

    @property
    def is_done(self) -> bool:
        return self.num_scored == len(self.token_ids)

    def add(self, part: ScoredCompletion) -> None:
        self.num_scored += len(part.logprobs)
        self._parts.append(part)

    def result(self) -> ScoredCompletion:
        parts = self._parts
        logits = [part.logits for part in parts if part.logits is not None]
        return ScoredCompletion(
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.is_greedy for part in parts if part.is_greedy is not None]),
            np.concatenate(logits) if logits else None,
        )


def forced_request(request: ScoringRequest) -> GenerationRequest:
    """Return the request that scores by decoding: greedy sampling, overruled token by token."""
    return GenerationRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=SamplingParams(num_samples=len(request.completions), temperature=0.0),
        logprob_temperature=request.temperature,
        deadline_s=request.deadline_s,
        cache_salt=request.cache_salt,
        client=request.client,
        forced_completions=request.completions,
        keep_logits=request.with_logits,
    )


class ForcedScores:
    """Collects the events of a forced request into its future."""

    def __init__(self, num_completions: int) -> None:
        self.future = uncancellable_future()
        self._scored: dict[int, ScoredCompletion] = {}
        self._num_completions = num_completions

    def sink(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, FinishedEvent) and not self.future.done():
                self._add(event)

    def _add(self, event: FinishedEvent) -> None:
        if event.finish_reason is not FinishReason.LENGTH:
            self.future.set_exception(scoring_error(event.finish_reason, event.error))
            return
        logits = None if event.logits is None else event.logits.numpy()
        self._scored[event.index] = ScoredCompletion(
            np.array(event.logprobs),
            # What greedy sampling would have drawn had the probability 1, all others had none.
            np.array(event.processed_logprobs) == 0.0,
            logits,
        )
        if len(self._scored) == self._num_completions:
            self.future.set_result([self._scored[i] for i in range(self._num_completions)])


def scoring_error(reason: FinishReason, error: str) -> Exception:
    """Return what a scoring future fails with when the pass ends for `reason`."""
    if reason is FinishReason.DEADLINE:
        return TimeoutError("the deadline passed before the scoring was done")
    if reason is FinishReason.CANCELLED:
        return CancelledError()
    if reason is FinishReason.ERROR:
        return EngineFailedError(error)
    return EngineStoppedError(error or "the engine is shutting down")
