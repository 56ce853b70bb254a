"""Teacher-forced log-probabilities: what a model thinks of tokens that somebody else chose.

Two ways. One pass over prompt and completion is fast. Where the kernels of a pass and of a decode
step round differently, and int8 activations blow the difference up to whole nats, the completion
is decoded token by token instead, forced; then the scores are the bits that decoding would give.
`measure_path_noise` tells which it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from serve.backend import Backend
from serve.errors import EngineStoppedError
from serve.sampling import token_logprobs
from serve.sequence import Event, FinishedEvent, FinishReason, GenerationRequest, SamplingParams

# Beyond it a teacher-forced pass is not what decoding would have given, and k3 no estimate.
MAX_PATH_NOISE_NATS = 1e-3


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

    def __post_init__(self) -> None:
        assert self.prompt_token_ids and all(self.completions), "nothing to score"


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """Of one completion of T tokens: `logprobs` `(T,)` float64 in nats, at the request's
    temperature and untruncated; `logits` `(T, V)` float32, raw, only when asked for."""

    logprobs: NDArray[np.float64]
    logits: NDArray[np.float32] | None = None


def _uncancellable_future() -> Future[list[ScoredCompletion]]:
    """Return a future that the engine alone resolves; `Engine.cancel` is how to give up on it.

    Its `cancel` returns False. Otherwise another thread's cancel could come between any check and
    `set_result`, which would then raise in the middle of a step.
    """
    future: Future[list[ScoredCompletion]] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class ScoringJob:
    """A scoring request under way: the engine scores one chunk of completions per step."""

    request: ScoringRequest
    future: Future[list[ScoredCompletion]] = field(default_factory=_uncancellable_future)
    scored: list[ScoredCompletion] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.scored) == len(self.request.completions)

    def next_chunk(self, num_rows: int, max_tokens: int) -> Sequence[tuple[int, ...]]:
        """Return the next completions: at most `num_rows`, and at most `max_tokens` padded."""
        assert num_rows > 0, "scoring needs a free row"
        request = self.request
        rest = request.completions[len(self.scored) : len(self.scored) + num_rows]
        size, longest = 0, 0
        for completion in rest:
            longest = max(longest, len(request.prompt_token_ids) + len(completion))
            if size and longest * (size + 1) > max_tokens:
                break
            size += 1
        return rest[:size]

    def score_chunk(self, backend: Backend, first_row: int, num_rows: int, max_tokens: int) -> int:
        """Score the next chunk in cache rows from `first_row` on; returns its real tokens."""
        chunk = self.next_chunk(num_rows, max_tokens)
        self.scored += score(backend, first_row, self.request, chunk)
        return sum(len(self.request.prompt_token_ids) + len(c) for c in chunk)


def score(
    backend: Backend,
    first_row: int,
    request: ScoringRequest,
    completions: Sequence[tuple[int, ...]],
) -> Iterator[ScoredCompletion]:
    """Yield the scores of `completions`, computed in one right-padded forward pass.

    The logits that predict completion token t stand at position prompt + t − 1. The last token of
    a completion is not fed: nothing that is asked for depends on it.
    """
    prompt = request.prompt_token_ids
    rows = [(*prompt, *completion[:-1]) for completion in completions]
    wanted = [range(len(prompt) - 1, len(row)) for row in rows]
    logits = backend.forward(first_row, rows, [0] * len(rows), wanted)
    token_ids = torch.tensor([t for c in completions for t in c], device=logits.device)
    logprobs = token_logprobs(logits, token_ids, request.temperature)
    sizes = [len(c) for c in completions]
    for scored, row_logits in zip(logprobs.split(sizes), logits.split(sizes), strict=True):
        yield ScoredCompletion(
            scored.cpu().numpy(), row_logits.cpu().numpy().copy() if request.with_logits else None
        )


def forced_request(request: ScoringRequest) -> GenerationRequest:
    """Return the request that scores by decoding: greedy sampling, overruled token by token."""
    return GenerationRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=SamplingParams(num_samples=len(request.completions), temperature=0.0),
        logprob_temperature=request.temperature,
        deadline_s=request.deadline_s,
        forced_completions=request.completions,
        keep_logits=request.with_logits,
    )


class ForcedScores:
    """Collects the events of a forced request into its future."""

    def __init__(self, num_completions: int) -> None:
        self.future = _uncancellable_future()
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
        self._scored[event.index] = ScoredCompletion(np.array(event.logprobs), logits)
        if len(self._scored) == self._num_completions:
            self.future.set_result([self._scored[i] for i in range(self._num_completions)])


def scoring_error(reason: FinishReason, error: str) -> Exception:
    """Return what a scoring future fails with when the pass ends for `reason`."""
    if reason is FinishReason.DEADLINE:
        return TimeoutError("the deadline passed before the scoring was done")
    if reason is FinishReason.CANCELLED:
        return CancelledError()
    return EngineStoppedError(error or "the engine is shutting down")


def measure_path_noise(backend: Backend, num_tokens: int = 24) -> float:
    """Return the largest difference, in nats, between one-pass and decoded log-probabilities.

    A pseudo-random text is scored both ways; 0 means bit for bit the same. It runs the backend
    for the first time, so it warms it up, too. NaN when the model's logits are not finite.
    """
    num_tokens = min(num_tokens, backend.info.max_model_len)
    rng = np.random.default_rng(0)
    text = [int(t) for t in rng.integers(0, backend.info.vocab_size, num_tokens)]
    half = num_tokens // 2
    predicted = torch.tensor(text[half:])
    one_pass = backend.forward(0, [text[:-1]], [0], [range(half - 1, num_tokens - 1)])
    expected = token_logprobs(one_pass.clone(), predicted.to(one_pass.device), 1.0)
    steps = [backend.forward(0, [text[:half]], [0]).clone()]
    for position in range(half, num_tokens - 1):
        steps.append(backend.forward(0, [[text[position]]], [position]).clone())
    decoded = token_logprobs(torch.cat(steps), predicted.to(one_pass.device), 1.0)
    return float((decoded - expected).abs().max())
