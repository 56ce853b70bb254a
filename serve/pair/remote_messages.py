"""An engine's requests as messages to another server, and that server's answers as an engine's.

Pure translation; `serve.pair.remote_teacher` sends. Token ids travel as they are: both sides have
one tokenizer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from uuid import uuid4

import numpy as np

from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.engine.sequence import (
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Timings,
    TokenEvent,
)
from serve.errors import EngineFailedError

ROLE = pb.ROLE_TEACHER
# Ours by the message's; both name their members alike.
_FINISH_REASONS = {pb.FinishReason.Value(f"FINISH_REASON_{r.name}"): r for r in FinishReason}
_NO_DIVERGENCE = pb.DivergenceOptions(enabled=False)


def to_generate(request: GenerationRequest) -> pb.GenerateRequest:
    """Return the request to the other server; its seed makes the answer the one of this engine."""
    assert not request.forced_completions, "another server scores by Score"
    sampling = request.sampling
    is_raw = request.logprob_temperature == 1.0
    return pb.GenerateRequest(
        request_id=uuid4().hex,
        route=pb.ROUTE_TEACHER,
        prompt_token_ids=pb.TokenIds(ids=request.prompt_token_ids),
        sampling=pb.SamplingParams(
            num_samples=sampling.num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            seed=sampling.seed,
            stop=request.stop,
            stop_token_ids=sorted(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            repetition_penalty=sampling.repetition_penalty,
        ),
        divergence=pb.DivergenceOptions(
            enabled=False, basis=pb.BASIS_RAW if is_raw else pb.BASIS_TEMPERED
        ),
        output=pb.OutputOptions(
            top_logprobs=request.num_top_logprobs, text=False, processed_logprobs=True
        ),
        cache_salt=_salt(request.cache_salt),
    )


def to_score(request: ScoringRequest) -> pb.ScoreRequest:
    """Return the request to the other server."""
    return pb.ScoreRequest(
        request_id=uuid4().hex,
        prompt_token_ids=pb.TokenIds(ids=request.prompt_token_ids),
        completions=[
            pb.Completion(token_ids=pb.TokenIds(ids=token_ids)) for token_ids in request.completions
        ],
        roles=[ROLE],
        temperature=request.temperature,
        divergence=_NO_DIVERGENCE,
        cache_salt=_salt(request.cache_salt),
    )


def _salt(cache_salt: str | None) -> str:
    """Return a name for a tenant that says nothing about it; a new one for who shares nothing."""
    if cache_salt is None:
        return uuid4().hex
    return hashlib.sha256(cache_salt.encode()).hexdigest()[:32]


def from_score(response: pb.ScoreResponse, request: ScoringRequest) -> list[ScoredCompletion]:
    """Return the scores in the order of the request.

    Raises:
        EngineFailedError: the response does not fit the request.
    """
    scores = sorted(response.scores, key=lambda score: score.index)
    found = [(s.role, s.index, tuple(s.token_ids), len(s.logprobs)) for s in scores]
    if found != [(ROLE, index, ids, len(ids)) for index, ids in enumerate(request.completions)]:
        raise EngineFailedError("the teacher's server scored something else than it was sent")
    if any(len(score.is_greedy) not in (0, len(score.token_ids)) for score in scores):
        raise EngineFailedError("the teacher's server says of some tokens only if they are greedy")
    return [
        ScoredCompletion(
            np.array(score.logprobs, np.float64),
            # A server that does not know the field yet leaves it empty.
            np.array(score.is_greedy, np.bool_) if score.is_greedy else None,
        )
        for score in scores
    ]


class AnswerEvents:
    """Turns the responses of one Generate call into events: each sample ends exactly once.

    Its methods raise EngineFailedError for responses that are no answer: samples that were not
    asked for or end twice, tokens with a gap, twice, or others than the sample has at its end.
    """

    def __init__(self, num_samples: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self._logprobs: list[list[float]] = [[] for _ in range(num_samples)]
        self._unfinished = set(range(num_samples))
        self._last: pb.Sample | None = None

    def take(self, response: pb.GenerateResponse) -> list[Event]:
        """Return the events of a response.

        The last sample waits for Usage, which says how much of the prompt was cached.
        """
        match response.WhichOneof("event"):
            case "tokens":
                return list(self._token_events(response.tokens))
            case "complete":
                return self._complete(response.complete.sample)
            case "usage" if self._last is not None:
                cached = sum(role.cached_prompt_tokens for role in response.usage.roles)
                return [self._finished(self._last, cached)]
        return []

    def end(self, reason: FinishReason, error: str) -> list[Event]:
        """Return the events of what is unfinished: it ends for this reason."""
        events: list[Event] = []
        if self._last is not None:
            events.append(self._finished(self._last, 0))
        events += [
            FinishedEvent(
                index=index,
                finish_reason=reason,
                token_ids=tuple(self._tokens[index]),
                logprobs=tuple(self._logprobs[index]),
                timings=Timings(),
                error=error if reason in (FinishReason.ERROR, FinishReason.SHUTDOWN) else "",
                processed_logprobs=(math.nan,) * len(self._tokens[index]),
            )
            for index in sorted(self._unfinished)
        ]
        self._unfinished.clear()
        return events

    def _token_events(self, chunk: pb.TokenChunk) -> Iterator[TokenEvent]:
        num_tokens = len(chunk.token_ids)
        tops = chunk.top_logprobs or [pb.TopLogprobs()] * num_tokens
        _demand(chunk.index in self._unfinished, f"tokens of sample {chunk.index}")
        is_next = chunk.position == len(self._tokens[chunk.index])
        _demand(is_next, f"tokens of sample {chunk.index} from {chunk.position} on")
        has_all = len(chunk.logprobs) == len(tops) == num_tokens
        _demand(has_all, f"tokens of sample {chunk.index} without their log-probabilities")
        self._tokens[chunk.index] += chunk.token_ids
        self._logprobs[chunk.index] += chunk.logprobs
        for offset, (token_id, logprob, top) in enumerate(
            zip(chunk.token_ids, chunk.logprobs, tops, strict=True)
        ):
            yield TokenEvent(
                index=chunk.index,
                position=chunk.position + offset,
                token_id=token_id,
                logprob=logprob,
                processed_logprob=math.nan,  # travels with the whole sample alone
                top_logprobs=tuple((entry.token_id, entry.logprob) for entry in top.entries),
            )

    def _complete(self, sample: pb.Sample) -> list[Event]:
        is_awaited = sample.index in self._unfinished and self._last is None
        _demand(is_awaited, f"the end of sample {sample.index}")
        is_whole = list(sample.token_ids) == self._tokens[sample.index]
        _demand(is_whole, f"sample {sample.index} with other tokens than before its end")
        has_all = len(sample.logprobs) == len(sample.processed_logprobs) == len(sample.token_ids)
        _demand(has_all, f"sample {sample.index} without its log-probabilities")
        # A newer server may know more reasons than this one.
        is_known = sample.finish_reason in _FINISH_REASONS
        _demand(is_known, f"the reason {sample.finish_reason} for the end of sample {sample.index}")
        if self._unfinished == {sample.index}:
            self._last = sample
            return []
        return [self._finished(sample, 0)]

    def _finished(self, sample: pb.Sample, num_cached: int) -> FinishedEvent:
        self._unfinished.remove(sample.index)
        self._last = None
        timings = sample.timings
        return FinishedEvent(
            index=sample.index,
            finish_reason=_FINISH_REASONS[sample.finish_reason],
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs),
            timings=Timings(timings.queue_s, timings.prefill_s, timings.ttft_s, timings.decode_s),
            error=sample.error,
            processed_logprobs=tuple(sample.processed_logprobs),
            num_cached_prompt_tokens=num_cached,
        )


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise EngineFailedError(f"the teacher's server sent {what}")
