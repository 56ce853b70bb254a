"""One model's part of a request: draw the samples, then have the other model score them.

An arm runs on the asyncio loop and talks to engines; `serve.pair.coordinator` runs one or two of
them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import numpy as np

from serve.engine.mail import Mailbox
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import (
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Timings,
    TokenEvent,
)
from serve.errors import DeadlineError, EngineFailedError, EngineStoppedError, TandemError
from serve.pair.divergence import SampleDivergence, compare, compare_exactly, score
from serve.pair.request import GenerationSpec
from serve.pair.served import Role, ServedModel
from serve.text.stop_strings import CompletionText, StopChecker

logger = logging.getLogger(__name__)

# How much earlier than here a deadline may pass at the client.
_MAX_TRANSIT_S = 0.05

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ArmJob:
    """What an arm does: `model` answers `prompt_token_ids`, `reference`, if any, scores.

    Engines know the request as `key`. `deadline_s` is on their clock (monotonic). Events come
    through `mailbox`. Prompts share cached beginnings with those of the same `cache_salt` alone;
    engines serve `peer` in turns with others.
    """

    key: str
    cache_salt: str
    peer: str
    model: ServedModel
    reference: ServedModel | None
    spec: GenerationSpec
    prompt_token_ids: tuple[int, ...]
    deadline_s: float | None
    mailbox: Mailbox

    def generation_request(self) -> GenerationRequest:
        spec = self.spec
        return GenerationRequest(
            request_id=self.key,
            prompt_token_ids=self.prompt_token_ids,
            sampling=spec.sampling,
            logprob_temperature=spec.logprob_temperature,
            num_top_logprobs=spec.output.top_logprobs,
            deadline_s=self.deadline_s,
            cache_salt=self.cache_salt,
            client=self.peer,
            stop=spec.stop,
            make_stop_check=StopChecker(self.model.tokenizer, spec.stop) if spec.stop else None,
        )

    def scoring_request(self, completions: tuple[tuple[int, ...], ...]) -> ScoringRequest:
        return ScoringRequest(
            request_id=self.key,
            prompt_token_ids=self.prompt_token_ids,
            completions=completions,
            temperature=self.spec.logprob_temperature,
            deadline_s=self.deadline_s,
            cache_salt=self.cache_salt,
            client=self.peer,
        )


@dataclass(slots=True)
class SampleChunk:
    """New tokens of sample `index`, from `position` on, and the text that became certain."""

    role: Role
    index: int
    position: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class SampleResult:
    """One completion. `error` says why it has none, `divergence_error` why it has no divergence.

    `answer` and `correct` are set by `serve.pair.answers.judge`, which says when they are None.
    """

    role: Role
    index: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    processed_logprobs: tuple[float, ...] = ()
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    text: str = ""
    text_ends: list[int] = field(default_factory=list)
    answer: str | None = None
    correct: bool | None = None
    timings: Timings = field(default_factory=Timings)
    num_cached_prompt_tokens: int = 0
    error: str = ""
    divergence: SampleDivergence | None = None
    divergence_error: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether it ended as it should, and so may be judged."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """All samples of one model, by index."""

    role: Role
    prompt_token_ids: tuple[int, ...]
    samples: list[SampleResult]

    @property
    def num_cached_prompt_tokens(self) -> int:
        return max(sample.num_cached_prompt_tokens for sample in self.samples)

    @property
    def is_complete(self) -> bool:
        return all(sample.is_complete for sample in self.samples)


OnChunk = Callable[[SampleChunk], None]


async def run_arm(job: ArmJob, on_chunk: OnChunk) -> ArmResult:
    """Draw and score. A failing reference leaves `divergence_error` behind and nothing else.

    Raises:
        TandemError: the model itself gave nothing: see `_check_any`; or it took no work.
    """
    samples = await _Drawing(job, on_chunk).run()
    _check_any(samples)
    return await _scored(job, samples)


async def run_arm_or_spare(
    make_spare: Callable[[], Awaitable[ArmJob]], job: ArmJob, on_chunk: OnChunk
) -> ArmResult:
    """As `run_arm`; where its model is lost before a token was shown, the spare one answers."""
    is_seen = False

    def on_seen_chunk(chunk: SampleChunk) -> None:
        nonlocal is_seen
        is_seen = job.spec.output.stream
        on_chunk(chunk)

    result, error = None, None
    try:
        result = await run_arm(job, on_seen_chunk)
    except EngineStoppedError as stopped:
        error = stopped
    if not is_seen and (result is None or _is_cut_off(result)):
        spare = await make_spare()
        if spare.model.is_alive:
            return await run_arm(spare, on_chunk)
    if result is None:
        assert error is not None
        raise error
    return result


def _is_cut_off(result: ArmResult) -> bool:
    return any(sample.finish_reason is FinishReason.SHUTDOWN for sample in result.samples)


async def run_second_arm(job: ArmJob, on_chunk: OnChunk) -> ArmResult:
    """As `run_arm`, but a failure becomes the samples' `error`: it must not fail the first arm.

    Samples that ended too early say how, and keep the tokens that chunks have brought already.
    """
    try:
        samples = await _Drawing(job, on_chunk).run()
    except Exception as error:  # any failure of this model, told to the client in `error`
        text = describe_failure(error)
        samples = [
            SampleResult(job.model.role, index, FinishReason.ERROR, error=text)
            for index in range(job.spec.sampling.num_samples)
        ]
    return await _scored(job, samples)


async def _scored(job: ArmJob, samples: list[SampleResult]) -> ArmResult:
    if job.reference is not None:
        await _try_to_score(job, job.reference, samples)
    return ArmResult(job.model.role, job.prompt_token_ids, samples)


def describe_failure(error: Exception) -> str:
    """Return a text for the client: an expected error's own, else an id to be found in the log."""
    if isinstance(error, (TandemError, TimeoutError)):
        return str(error)
    error_id = secrets.token_hex(8)
    logger.error("error id %s", error_id, exc_info=error)
    return f"internal error; error id {error_id}"


def _check_any(samples: list[SampleResult]) -> None:
    """Raise when all samples ended for one reason that leaves nothing worth returning."""
    reasons = {sample.finish_reason for sample in samples}
    if reasons == {FinishReason.ERROR}:
        raise EngineFailedError(samples[0].error)
    if reasons == {FinishReason.DEADLINE}:
        raise DeadlineError("the deadline passed before any sample ended")
    if reasons == {FinishReason.SHUTDOWN} and not any(sample.token_ids for sample in samples):
        raise EngineStoppedError(samples[0].error or "the server shut down before the first token")


def reason_to_give_up(deadline_s: float | None) -> FinishReason:
    """Tell a client whose deadline passed from one that gave up: grpc cancels the call of both.

    The client's clock started before the message was here, so its deadline passes before ours.
    """
    is_over = deadline_s is not None and time.monotonic() >= deadline_s - _MAX_TRANSIT_S
    return FinishReason.DEADLINE if is_over else FinishReason.CANCELLED


class _Drawing:
    """Submits a job and follows its events until each sample has ended."""

    def __init__(self, job: ArmJob, on_chunk: OnChunk) -> None:
        self._job = job
        self._on_chunk = on_chunk
        num_samples = job.spec.sampling.num_samples
        self._texts = [
            CompletionText(job.model.tokenizer, job.spec.stop) for _ in range(num_samples)
        ]
        self._released: list[list[str]] = [[] for _ in range(num_samples)]
        self._text_ends: list[list[int]] = [[] for _ in range(num_samples)]
        self._top_logprobs: list[list[TopLogprobs]] = [[] for _ in range(num_samples)]
        self._results: dict[int, SampleResult] = {}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> list[SampleResult]:
        request, engine = self._job.generation_request(), self._job.model.engine
        engine.submit(request, self._job.mailbox.sink(self._deliver))
        try:
            await self._ended
        finally:
            if len(self._results) < request.sampling.num_samples:
                engine.cancel(request.request_id, reason_to_give_up(request.deadline_s))
        return [self._results[index] for index in sorted(self._results)]

    def _deliver(self, events: list[Event]) -> None:
        """Take a step's events where they arrive: a task in between would be woken per token."""
        if self._ended.done():
            return
        try:
            self._take(events)
        except Exception as error:  # raised again by `run`
            self._ended.set_exception(error)
            return
        if len(self._results) == self._job.spec.sampling.num_samples:
            self._ended.set_result(None)

    def _take(self, events: list[Event]) -> None:
        """Pass one step's events on: at most one chunk per sample."""
        chunks: dict[int, SampleChunk] = {}
        for event in events:
            if isinstance(event, TokenEvent):
                self._add_token(chunks, event)
            else:
                self._finish(chunks, event)
        for chunk in chunks.values():
            if chunk.token_ids or chunk.text:
                self._on_chunk(chunk)

    def _chunk(self, chunks: dict[int, SampleChunk], index: int, position: int) -> SampleChunk:
        if index not in chunks:
            chunks[index] = SampleChunk(self._job.model.role, index, position)
        return chunks[index]

    def _add_token(self, chunks: dict[int, SampleChunk], event: TokenEvent) -> None:
        chunk = self._chunk(chunks, event.index, event.position)
        chunk.token_ids.append(event.token_id)
        chunk.logprobs.append(event.logprob)
        if self._job.spec.output.top_logprobs:
            chunk.top_logprobs.append(event.top_logprobs)
            self._top_logprobs[event.index].append(event.top_logprobs)
        text = self._texts[event.index]
        self._release(chunk, text.push([event.token_id]))
        self._text_ends[event.index].append(text.num_chars)

    def _finish(self, chunks: dict[int, SampleChunk], event: FinishedEvent) -> None:
        chunk = self._chunk(chunks, event.index, len(event.token_ids))
        self._release(chunk, self._texts[event.index].finish())
        whole = "".join(self._released[event.index])
        text_ends = [min(end, len(whole)) for end in self._text_ends[event.index]]
        # Where the last token leaves a character incomplete, what stands for it is its text.
        text_ends[-1:] = [len(whole)] * len(text_ends[-1:])
        self._results[event.index] = SampleResult(
            role=self._job.model.role,
            index=event.index,
            finish_reason=event.finish_reason,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            processed_logprobs=event.processed_logprobs,
            top_logprobs=self._top_logprobs[event.index],
            text=whole,
            text_ends=text_ends,
            timings=event.timings,
            num_cached_prompt_tokens=event.num_cached_prompt_tokens,
            error=event.error,
        )

    def _release(self, chunk: SampleChunk, text: str) -> None:
        if text:
            chunk.text += text
            self._released[chunk.index].append(text)


async def score_samples(job: ArmJob, reference: ServedModel, samples: list[SampleResult]) -> None:
    """Give every sample that has tokens its divergence, or say in it why it has none.

    Raises:
        Exception: the reference could not score; nothing has changed then.
    """
    to_score = [sample for sample in samples if sample.token_ids]
    if not to_score:
        return
    request = job.scoring_request(tuple(sample.token_ids for sample in to_score))
    scored = await score(reference, request)
    for sample, completion in zip(to_score, scored, strict=True):
        await _compare_sample(job, reference, sample, completion.logprobs)


async def _try_to_score(job: ArmJob, reference: ServedModel, samples: list[SampleResult]) -> None:
    try:
        await score_samples(job, reference, samples)
    except Exception as error:  # any failure of the reference, told in `divergence_error`
        text = describe_failure(error)
        for sample in samples:
            if sample.token_ids:
                sample.divergence_error = text


async def _compare_sample(
    job: ArmJob,
    reference: ServedModel,
    sample: SampleResult,
    reference_logprobs: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> None:
    try:
        sample.divergence = compare(
            sample.role, np.asarray(sample.logprobs), reference.role, reference_logprobs
        )
        if job.spec.divergence.exact:
            request = job.scoring_request((sample.token_ids,))
            exact = await compare_exactly(job.model, reference, request)
            sample.divergence = replace(sample.divergence, exact=exact)
    except Exception as error:  # as above; what is known already stays
        sample.divergence_error = describe_failure(error)
