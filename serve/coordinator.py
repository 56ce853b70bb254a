"""One request from admission to judgement, over one or two engines; knows nothing about gRPC.

Runs on the asyncio loop. `serve.service` translates messages on either side of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from serve.agreement import Agreement, judge
from serve.arms import ArmJob, ArmResult, OnChunk, run_arm, run_second_arm
from serve.comparison import CompletionScore, score_with_models
from serve.errors import EngineStoppedError, InvalidFieldError
from serve.mailbox import Mailbox
from serve.metrics import ServerMetrics
from serve.routing import (
    Engines,
    Role,
    ServedModel,
    check_comparable,
    choose_models,
    resolve_divergence,
)
from serve.scoring import ScoringRequest
from serve.specs import GenerationSpec, Limits, Prompt, ScoreSpec
from serve.tokenization import Tokenizer
from serve.validation import check_context, tokenize, tokenize_completions

OnArm = Callable[[ArmResult], None]
RunArm = Callable[[ArmJob, OnChunk], Awaitable[ArmResult]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the models made of one prompt: the arms, the first one's first, and what they say."""

    arms: list[ArmResult]
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """What the models think of given completions: by model, then by completion."""

    scores: list[CompletionScore]
    requests: dict[Role, ScoringRequest]


class Coordinator:
    """Admits requests, has models answer and score them, and counts what came of it.

    Deadlines are on the monotonic clock, which is the engines'; None is no deadline.
    """

    def __init__(self, engines: Engines, limits: Limits, metrics: ServerMetrics) -> None:
        self.engines = engines
        self.limits = limits
        self._metrics = metrics
        self._mailbox = Mailbox()
        self._running_ids: set[str] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, grace_s: float) -> None:
        """Refuse new work, and wait for what runs, but no longer than the grace."""
        self._is_draining = True
        self._metrics.draining.set(1)
        async with running(self._idle.wait()) as tasks:
            await asyncio.wait(tasks, timeout=grace_s)

    async def answer(
        self, spec: GenerationSpec, deadline_s: float | None, on_chunk: OnChunk, on_arm: OnArm
    ) -> Answer:
        """Have one or both models answer; `on_chunk` and `on_arm` see the parts as they come.

        Raises:
            TandemError: the request cannot be served, or its first model failed.
        """
        with self._admitted(spec.request_id):
            first, *others = await self._jobs(spec, deadline_s)
            arms_to_run = [
                self._run(run_arm, first, on_chunk, on_arm),
                *(self._run(run_second_arm, job, on_chunk, on_arm) for job in others),
            ]
            async with running(*arms_to_run) as tasks:
                arms = await asyncio.gather(*tasks)
        agreement = judge(spec.evaluation, arms)
        if agreement is not None:
            self._metrics.on_agreement(agreement, spec.evaluation.task)
        return Answer(arms, agreement)

    async def score(self, spec: ScoreSpec, deadline_s: float | None) -> ScoreAnswer:
        """Have the asked models score completions.

        Raises:
            TandemError: the request cannot be served, or a model failed.
        """
        with self._admitted(spec.request_id):
            models = [self.engines.get(role) for role in spec.roles] or list(self.engines.loaded)
            wants_divergence = spec.divergence.enabled
            if wants_divergence is None:
                wants_divergence = len(models) == 2
            if wants_divergence:
                check_comparable(models)
            pairs = [(m, await self._scoring_request(spec, m, deadline_s)) for m in models]
            scores = await score_with_models(
                pairs, wants_divergence=wants_divergence, wants_exact=spec.divergence.exact
            )
        return ScoreAnswer(scores, {model.role: request for model, request in pairs})

    @contextmanager
    def _admitted(self, request_id: str) -> Iterator[None]:
        """Hold the request's id while it runs; refuse one that is in use, or all when draining."""
        if self._is_draining:
            raise EngineStoppedError("the server is draining and takes no new work")
        if request_id in self._running_ids:
            raise InvalidFieldError.of(
                "request_id", f"is {request_id!r}, which is running; must be new or empty"
            )
        self._running_ids.add(request_id)
        self._idle.clear()
        try:
            yield
        finally:
            self._running_ids.remove(request_id)
            if not self._running_ids:
                self._idle.set()

    async def _jobs(self, spec: GenerationSpec, deadline_s: float | None) -> list[ArmJob]:
        """Return one job per answering model, checked against the context before any starts."""
        models = choose_models(spec.route, self.engines)
        is_scored = resolve_divergence(spec.divergence.enabled, self.engines)
        jobs = []
        for model in models:
            prompt = await _tokenize(spec.prompt, model.tokenizer)
            check_context(len(prompt), spec.sampling.max_tokens, self.limits)
            reference = self.engines.get(model.role.other) if is_scored else None
            jobs.append(ArmJob(model, reference, spec, prompt, deadline_s, self._mailbox))
        return jobs

    async def _run(self, run: RunArm, job: ArmJob, on_chunk: OnChunk, on_arm: OnArm) -> ArmResult:
        started_s = time.monotonic()
        result = await run(job, on_chunk)
        role, spec = result.role.value, job.spec
        self._metrics.request_duration.labels(role).observe(time.monotonic() - started_s)
        for sample in result.samples:
            self._metrics.on_divergence(
                sample, spec.evaluation.task, is_truncated=spec.sampling.is_truncated
            )
        on_arm(result)
        return result

    async def _scoring_request(
        self, spec: ScoreSpec, model: ServedModel, deadline_s: float | None
    ) -> ScoringRequest:
        prompt = await _tokenize(spec.prompt, model.tokenizer)
        completions = await asyncio.to_thread(
            tokenize_completions, spec, len(prompt), model.tokenizer, self.limits
        )
        return ScoringRequest(
            spec.request_id, prompt, completions, spec.temperature, deadline_s=deadline_s
        )


async def _tokenize(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt's token ids, text tokenized beside the loop. Raises like `tokenize`.

    Ids need no thread, whose turn would come between requests that could start together.
    """
    if prompt.token_ids:
        return prompt.token_ids
    return await asyncio.to_thread(tokenize, prompt, tokenizer)


@asynccontextmanager
async def running(
    *coroutines: Coroutine[Any, Any, Any],
) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run coroutines as tasks during the block; none of them outlives it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
