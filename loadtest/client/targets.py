"""How a planned request reaches a server, and what it answers: the protocol of Tandem itself.

A target fills in the record's tokens, times and answers; when a request is sent, and what becomes
of its status, is up to `loadtest.client.runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from bundle.errors import UserError
from loadtest.config import RunConfig
from loadtest.ledger.journal import OK, Journal
from loadtest.records import DatasetPrompt, PlannedRequest, RequestRecord, SampleRecord
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient, IncompleteStreamError, Tls, explain

INCOMPLETE, CANCELLED = "INCOMPLETE", "CANCELLED"
# Answers to questions about models come at once, or there is nobody.
CHECK_TIMEOUT_S = 10.0
_ROUTES = {"student": pb.ROUTE_STUDENT, "teacher": pb.ROUTE_TEACHER}
_ROLES = {pb.ROLE_STUDENT: "student", pb.ROLE_TEACHER: "teacher"}

# Seconds since the run's start.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server may ask for."""

    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class RunJournal:
    """A journal's lines, and what sets the ids of a run's requests apart from those of others."""

    lines: Journal
    run_id: str


class RequestFailedError(Exception):
    """A request ended without its answer; `status` as `RequestRecord.status`."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


class LoadTarget(Protocol):
    """A server; lives on one event loop.

    Made of the run's settings, its prompts by id, the credentials, and a journal, or None.
    """

    async def check(self) -> None:
        """Ask for the arms; UserError where the server cannot be reached or lacks one."""

    async def send(self, record: RequestRecord, clock: Clock) -> None:
        """Send the record's request and fill in what comes; RequestFailedError."""

    async def wait_connected(self) -> None:
        """Wait for a connection, for ever if need be."""

    async def close(self) -> None:
        """Disconnect; calls that still run are cancelled."""


class TandemTarget:
    """A Tandem server: arms are its routes, a prompt is one user message.

    Nothing is sent twice, and nothing is scored by the other model.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, DatasetPrompt],
        credentials: Credentials = Credentials(),
        journal: RunJournal | None = None,
    ) -> None:
        """Connect at the first call; OSError and ValueError as `AsyncClient`."""
        self._config = config
        self._prompts = prompts
        self._journal = journal
        self._client = AsyncClient(
            config.target, token=credentials.token, tls=credentials.tls, max_attempts=1
        )

    async def check(self) -> None:
        try:
            models = (await self._client.get_models(CHECK_TIMEOUT_S)).models
        except grpc.RpcError as error:
            raise UserError(f"--target {self._config.target}: {explain(error)}") from None
        check_arms(self._config, [_ROLES[model.role] for model in models if model.role in _ROLES])

    async def send(self, record: RequestRecord, clock: Clock) -> None:
        request = self._request(record.plan)
        with self._journalled(request):
            try:
                await self._receive(request, record, clock)
            except grpc.RpcError as error:
                raise to_failure(error) from None
            except IncompleteStreamError as error:
                raise RequestFailedError(INCOMPLETE, str(error)) from None

    async def wait_connected(self) -> None:
        await self._client.wait_connected()

    async def close(self) -> None:
        await self._client.close()

    @contextmanager
    def _journalled(self, request: pb.GenerateRequest) -> Iterator[None]:
        """Note a request in the journal, if there is one, and the status with which it ended."""
        if self._journal is None:
            yield
            return
        self._journal.lines.sent(request)
        status = CANCELLED
        try:
            yield
            status = OK
        except RequestFailedError as failed:
            status = failed.status
            raise
        finally:
            self._journal.lines.ended(request.request_id, status)

    async def _receive(
        self, request: pb.GenerateRequest, record: RequestRecord, clock: Clock
    ) -> None:
        """Note tokens as they come, and the samples when the stream has ended."""
        async with self._client.generate(request, self._config.timeout_s) as stream:
            async for event in stream:
                if self._journal is not None:
                    self._journal.lines.received(request.request_id, event)
                if event.HasField("tokens"):
                    now_s, chunk = clock(), event.tokens
                    sample = sample_of(record, chunk.index)
                    sample.token_ids += chunk.token_ids
                    sample.token_times_s += [now_s] * len(chunk.token_ids)
            generation = await stream.result()
        for message in generation.samples:
            _fill(sample_of(record, message.index), message)
        record.num_prompt_tokens = sum(role.prompt_tokens for role in generation.usage.roles)

    def _request(self, plan: PlannedRequest) -> pb.GenerateRequest:
        config, prompt = self._config, self._prompts[plan.prompt_id]
        request = pb.GenerateRequest(
            request_id=f"{self._journal.run_id}.{plan.number}" if self._journal else "",
            route=_ROUTES[plan.arm],
            messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt.text)]),
            sampling=pb.SamplingParams(
                num_samples=config.num_samples,
                temperature=config.temperature,
                max_tokens=prompt.max_tokens or config.max_tokens,
                seed=plan.seed,
                ignore_eos=prompt.ignore_eos,
            ),
            divergence=pb.DivergenceOptions(enabled=False),
            output=pb.OutputOptions(logprobs=False),
        )
        if prompt.answer_format != "none":
            request.evaluation.answer_format = prompt.answer_format
            if prompt.reference_answer is not None:
                request.evaluation.reference_answer = prompt.reference_answer
        return request


def check_arms(config: RunConfig, served: Iterable[str]) -> None:
    """Compare the arms with the models that are there; UserError where one is missing."""
    served = list(served)
    if missing := [arm for arm in config.arms if arm not in served]:
        raise UserError(
            f"--arms: {config.target} does not serve {', '.join(missing)}; "
            f"it has {', '.join(served) or 'no models'}"
        )


def to_failure(error: grpc.RpcError) -> RequestFailedError:
    """Translate the error of an asynchronous call."""
    assert isinstance(error, grpc.aio.AioRpcError)
    return RequestFailedError(error.code().name, error.details() or "")


def sample_of(record: RequestRecord, index: int) -> SampleRecord:
    """Return the sample of that index; samples are made when they are first heard of, in order."""
    while len(record.samples) <= index:
        record.samples.append(SampleRecord(len(record.samples)))
    return record.samples[index]


def _fill(sample: SampleRecord, message: pb.Sample) -> None:
    """Take over a complete sample; the times of its tokens are known."""
    sample.finish_reason = pb.FinishReason.Name(message.finish_reason)[len("FINISH_REASON_") :]
    sample.token_ids = list(message.token_ids)
    sample.text = message.text
    sample.answer = message.answer if message.HasField("answer") else None
    sample.is_correct = message.correct if message.HasField("correct") else None
