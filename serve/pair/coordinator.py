"""One request from admission to judgement, over one or two engines; knows nothing about gRPC.

Runs on the asyncio loop. `serve.rpc.inference` translates messages on either side of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.engine.mail import Mailbox
from serve.engine.scoring import ScoringRequest
from serve.errors import AbortedError, DrainingError, UnknownRequestError
from serve.pair.admission import (
    check_capacity,
    check_known,
    fit_context,
    tokenize,
    tokenize_completions,
)
from serve.pair.answers.formats import starts_in_reasoning
from serve.pair.answers.judge import Case, Judge, Judgement
from serve.pair.arm import (
    ArmJob,
    ArmResult,
    OnChunk,
    SampleResult,
    run_arm,
    run_arm_or_spare,
    run_second_arm,
)
from serve.pair.divergence import CompletionScore, score_with_models
from serve.pair.observer import PairObserver
from serve.pair.request import GenerationSpec, Limits, Prompt, ScoreSpec
from serve.pair.routing import (
    Route,
    TrafficPolicy,
    are_comparable,
    check_comparable,
    choose_models,
    resolve_divergence,
)
from serve.pair.served import Engines, Role, ServedModel
from serve.pair.shadow import Shadows
from serve.pair.tasks import running
from serve.text.tokenizer import Tokenizer

OnArm = Callable[[ArmResult], None]
RunArm = Callable[[ArmJob, OnChunk], Awaitable[ArmResult]]


@dataclass(frozen=True, slots=True)
class GenerationAnswer:
    """The arms of one prompt, the first model's first, and the judgement of their answers."""

    arms: list[ArmResult]
    agreement: Judgement | None

    @property
    def is_whole(self) -> bool:
        """Whether every sample ended as it should, and has the divergence that was asked for."""
        samples = [sample for arm in self.arms for sample in arm.samples]
        return all(sample.is_complete and not sample.divergence_error for sample in samples)


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """The scores of given completions: by model, then by completion."""

    scores: list[CompletionScore]
    requests: dict[Role, ScoringRequest]


@dataclass(frozen=True, slots=True)
class _Terms:
    """What engines know a request by, besides its content: see `ArmJob`."""

    key: str
    tenant: str
    peer: str
    deadline_s: float | None


@dataclass(slots=True)
class _Running:
    """A request that was admitted, and the task that answers it."""

    request_id: str
    task: asyncio.Task[Any]
    is_aborted: bool = False


class Coordinator:
    """Admits requests, runs their arms, has the answers judged, and tells the observer.

    Deadlines are on the monotonic clock, which is the engines'.
    """

    def __init__(
        self,
        engines: Engines,
        limits: Limits,
        observer: PairObserver,
        policy: TrafficPolicy,
        shadows: Shadows,
        judge: Judge,
    ) -> None:
        self.engines = engines
        self.limits = limits
        self.policy = policy
        self._observer = observer
        self._shadows = shadows
        self._judge = judge
        self._mailbox = Mailbox()
        self._running: dict[str, _Running] = {}
        self._num_admitted = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._running)

    @property
    def num_shadows(self) -> int:
        return self._shadows.num_pending

    async def drain(self, grace_s: float) -> None:
        """Refuse new work, and wait for what runs, but no longer than the grace."""
        self._is_draining = True
        self._observer.on_drain()
        async with running(self._idle.wait()) as tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        await self._shadows.stop()

    def abort(self, request_id: str) -> None:
        """End the running requests of this id, whose callers get an AbortedError.

        Raises:
            UnknownRequestError: there is none.
        """
        found = [one for one in self._running.values() if one.request_id == request_id]
        if not found:
            raise UnknownRequestError(f"no request {request_id!r} is running here")
        for one in found:
            one.is_aborted = True
            one.task.cancel()

    def check_room(self, spec: GenerationSpec) -> None:
        """Raise what `answer` would if its first model has no room now.

        Under overload most requests end here. Those that are refused as late as `answer` can tell
        take half as much again of the time that the others need.
        """
        self._check_open()
        check_capacity(spec.sampling.num_samples, self.limits)
        self._choose_models(spec)[0].engine.check_room(spec.sampling.num_samples)

    async def answer(
        self,
        spec: GenerationSpec,
        on_chunk: OnChunk,
        on_arm: OnArm,
        *,
        deadline_s: float | None = None,
        tenant: str = "",
        peer: str = "",
    ) -> GenerationAnswer:
        """Have one or both models answer; `on_chunk` and `on_arm` see the parts as they come.

        Raises:
            TandemError: the request cannot be served, or its first model failed.
        """
        with self._admitted(spec.request_id) as key:
            terms = _Terms(key, tenant, peer, deadline_s)
            first, *others = await self._jobs(spec, terms)
            case = Case(tenant, deadline_s)
            arms_to_run = [
                self._run(self._first_run(first, terms), first, on_chunk, on_arm, case),
                *(self._run(run_second_arm, job, on_chunk, on_arm, case) for job in others),
            ]
            async with running(*arms_to_run) as tasks:
                arms = await asyncio.gather(*tasks)
            judgement = await self._judge.judge(spec.evaluation, arms, case)
        if judgement is not None:
            self._observer.on_judgement(judgement, spec.evaluation.task)
        if arms[0].role is first.model.role:
            self._shadow(first, arms[0])
        return GenerationAnswer(arms, judgement)

    async def score(
        self,
        spec: ScoreSpec,
        *,
        deadline_s: float | None = None,
        tenant: str = "",
        peer: str = "",
    ) -> ScoreAnswer:
        """Have the asked models score completions.

        Raises:
            TandemError: the request cannot be served, or a model failed.
        """
        with self._admitted(spec.request_id) as key:
            terms = _Terms(key, tenant, peer, deadline_s)
            models = [self.engines.get(role) for role in spec.roles] or list(self.engines.loaded)
            wants_divergence = spec.divergence.enabled
            if wants_divergence is None:
                wants_divergence = len(models) == 2
            if wants_divergence:
                check_comparable(models, exactly=spec.divergence.exact)
            pairs = [(m, await self._scoring_request(spec, m, terms)) for m in models]
            scores = await score_with_models(
                pairs, wants_divergence=wants_divergence, wants_exact=spec.divergence.exact
            )
        return ScoreAnswer(scores, {model.role: request for model, request in pairs})

    @contextmanager
    def _admitted(self, request_id: str) -> Iterator[str]:
        """Count a request among those that run, under a key that no other one has ever had.

        Raises:
            DrainingError: the server is draining.
            AbortedError: `abort` ended the block.
        """
        self._check_open()
        task = asyncio.current_task()
        assert task is not None
        self._num_admitted += 1
        key, one = f"{request_id} {self._num_admitted}", _Running(request_id, task)
        self._running[key] = one
        self._idle.clear()
        try:
            yield key
        except asyncio.CancelledError:
            if not one.is_aborted:
                raise
            task.uncancel()
            raise AbortedError from None
        finally:
            del self._running[key]
            if not self._running:
                self._idle.set()

    def _check_open(self) -> None:
        if self._is_draining:
            raise DrainingError("the server is draining and takes no new work")

    async def _jobs(self, spec: GenerationSpec, terms: _Terms) -> list[ArmJob]:
        """Return one job per answering model, checked against the context before any starts."""
        self._judge.check(spec.evaluation)
        models = self._choose_models(spec)
        is_scored = resolve_divergence(
            spec.divergence.enabled, self.engines, exactly=spec.divergence.exact
        )
        check_capacity(spec.sampling.num_samples, self.limits)
        return await self._jobs_for(models, spec, terms, is_scored=is_scored)

    def _choose_models(self, spec: GenerationSpec) -> tuple[ServedModel, ...]:
        auto = self.policy.choose_role(spec.request_id)
        return choose_models(spec.route, self.engines, auto)

    async def _jobs_for(
        self,
        models: Sequence[ServedModel],
        spec: GenerationSpec,
        terms: _Terms,
        *,
        is_scored: bool,
    ) -> list[ArmJob]:
        """Return the jobs of these models, all of the same `max_tokens`."""
        prompts = [await _tokenize(spec.prompt, model) for model in models]
        involved = self.engines.loaded if is_scored else models
        remote = [model.engine.info.max_model_len for model in involved if model.address]
        spec = fit_context(spec, max(map(len, prompts)), self.limits, remote)
        return [
            ArmJob(
                key=f"{terms.key} {model.role.value}",
                cache_salt=_cache_salt(terms.tenant, spec.cache_salt),
                peer=terms.peer,
                model=model,
                reference=self.engines.get(model.role.other) if is_scored else None,
                spec=spec,
                prompt_token_ids=prompt,
                deadline_s=terms.deadline_s,
                mailbox=self._mailbox,
            )
            for model, prompt in zip(models, prompts, strict=True)
        ]

    def _first_run(self, job: ArmJob, terms: _Terms) -> RunArm:
        """Return how the first arm runs: where the server chose the model, with a spare one."""
        if job.spec.route is not Route.AUTO or len(self.engines.loaded) < 2:
            return run_arm
        spare = self.engines.get(job.model.role.other)
        is_scored = job.reference is not None

        async def make_spare() -> ArmJob:
            (made,) = await self._jobs_for((spare,), job.spec, terms, is_scored=is_scored)
            return made

        return partial(run_arm_or_spare, make_spare)

    def _shadow(self, job: ArmJob, arm: ArmResult) -> None:
        """Offer an answer of AUTO without a divergence to shadow scoring if the policy says so."""
        is_wanted = (
            job.spec.route is Route.AUTO
            and job.reference is None
            and arm.is_complete
            and are_comparable(self.engines.loaded)
            and self.policy.wants_shadow(job.spec.request_id)
        )
        if is_wanted:
            self._shadows.offer(job, self.engines.get(job.model.role.other), arm.samples)

    async def _run(
        self, run: RunArm, job: ArmJob, on_chunk: OnChunk, on_arm: OnArm, case: Case
    ) -> ArmResult:
        started_s = time.monotonic()
        result = await run(job, on_chunk)
        self._observer.on_arm(result, time.monotonic() - started_s)
        self._observer.on_divergences(result.samples, job.spec)
        tokenizer = job.model.tokenizer
        await self._judge.read_answers(
            result.samples,
            job.spec.evaluation,
            case,
            starts_in_reasoning=starts_in_reasoning(job.prompt_token_ids, tokenizer),
            read_text=partial(_text_with_reasoning, tokenizer),
        )
        on_arm(result)
        return result

    async def _scoring_request(
        self, spec: ScoreSpec, model: ServedModel, terms: _Terms
    ) -> ScoringRequest:
        prompt = await _tokenize(spec.prompt, model)
        completions = await asyncio.to_thread(
            tokenize_completions, spec, len(prompt), model, self.limits
        )
        return ScoringRequest(
            terms.key,
            prompt,
            completions,
            spec.temperature,
            deadline_s=terms.deadline_s,
            cache_salt=_cache_salt(terms.tenant, spec.cache_salt),
            client=terms.peer,
        )


def _text_with_reasoning(tokenizer: Tokenizer, sample: SampleResult) -> str:
    """Return a sample's text, from its tokens where the text lacks the marks around reasoning."""
    if not tokenizer.hides_reasoning:
        return sample.text
    return tokenizer.decode_with_reasoning(sample.token_ids)


def _cache_salt(tenant: str, given: str) -> str:
    """Return the salt of a request: tenants share nothing, nor do the salts of one tenant."""
    return f"{tenant}\0{given}"


async def _tokenize(prompt: Prompt, model: ServedModel) -> tuple[int, ...]:
    """Return the prompt's token ids, text tokenized beside the loop.

    Ids need no thread, whose turn would come between requests that could start together. Raises
    like `tokenize` and `check_known`.
    """
    if prompt.token_ids:
        return prompt.token_ids
    token_ids = await asyncio.to_thread(tokenize, prompt, model.tokenizer)
    check_known(prompt.field, token_ids, model)
    return token_ids
