"""The remote teacher: an engine's interface over another server's Generate and Score.

It may be lost at any time. Then requests that need it fail at once, calls that wait for it end, and
probes go on until it is back. Lives on one asyncio loop; `serve.pair.remote_messages` translates.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from bundle.errors import UserError, one_line
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from serve.client.channel import Endpoint
from serve.client.failures import explain
from serve.engine.engine import EngineLoad
from serve.engine.scoring import (
    ScoredCompletion,
    ScoringRequest,
    scoring_error,
    uncancellable_future,
)
from serve.engine.sequence import EventSink, FinishReason, GenerationRequest
from serve.errors import AbortedError, EngineStoppedError
from serve.models.backend import ModelInfo
from serve.pair.remote_messages import ROLE, AnswerEvents, from_score, to_generate, to_score

logger = logging.getLogger(__name__)

HEALTH_NAME = "model.teacher"
PROBE_PERIOD_S = 1.0
PROBE_TIMEOUT_S = 2.0
# Behind one address there may be several servers, of which the next probe asks the next one.
_NUM_PROBES = 3
# Of a call's time what is kept for the way back, so that who waits for it can still answer.
_RESERVE_SHARE, _MAX_RESERVE_S = 0.1, 1.0
# What still runs on a connection that was given up ends by its own deadline.
_LAST_CALLS_S = 3600.0

# What a status says about a sample; any other is an error. SHUTDOWN: the work was not taken.
_REASONS = {
    grpc.StatusCode.UNAVAILABLE: FinishReason.SHUTDOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: FinishReason.SHUTDOWN,
    grpc.StatusCode.UNAUTHENTICATED: FinishReason.SHUTDOWN,
    # A server that closes cancels what it has received and not yet begun.
    grpc.StatusCode.CANCELLED: FinishReason.SHUTDOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED: FinishReason.DEADLINE,
}


class _CallFailedError(Exception):
    """A call ended without an answer."""

    def __init__(self, reason: FinishReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(slots=True, eq=False)
class _Call:
    """A call on its way, and why we ended it, if we did."""

    request_id: str
    rpc: str
    task: asyncio.Task[None] | None = None
    is_begun: bool = False
    reason: FinishReason | None = None
    text: str = ""


class RemoteTeacher:
    """The teacher of the server at `address`, which must have the tokenizer `tokenizer_hash`.

    `open_endpoint` reads the credentials: at the start, and when the server refuses them or cannot
    be reached. A scoring may take `scoring_timeout_s`. `on_call` hears each call's rpc and code.
    """

    name = "teacher"

    def __init__(
        self,
        address: str,
        open_endpoint: Callable[[], Endpoint],
        *,
        tokenizer_hash: str,
        scoring_timeout_s: float,
        on_call: Callable[[str, str], None] = lambda rpc, code: None,
        probe_period_s: float = PROBE_PERIOD_S,
    ) -> None:
        self.address = address
        self.model = pb.Model(role=ROLE, address=address)
        self._open_endpoint = open_endpoint
        self.tokenizer_hash = tokenizer_hash
        self._scoring_timeout_s = scoring_timeout_s
        self._on_call = on_call
        self._probe_period_s = probe_period_s
        self.why_lost = "it was not reached yet"
        """Why it cannot be used; empty while it can."""
        self._is_stopping = False
        self._calls: set[_Call] = set()
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # -- as an engine -----------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """What the other server says of its model; empty until it was reached."""
        model = self.model
        return ModelInfo(
            backend=model.backend,
            device=model.device,
            precision=model.precision,
            num_parameters=model.num_parameters,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            max_num_seqs=model.max_num_seqs,
            batch_invariant=model.batch_invariant,
        )

    def start(self) -> None:
        """Connect on the running loop, and go on watching; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watch_forever())

    def watch(self) -> None:
        """Nothing: it is watched by probes."""

    def stop(self, timeout_s: float | None = None) -> None:
        """End everything with SHUTDOWN; called beside the loop, which must be running."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        """Send a request; `sink` gets its events. EngineStoppedError while the teacher is lost."""
        self._check_reachable()
        call = _Call(request.request_id, "Generate")
        self._run(call, self._generate(request, sink, call))

    def check_room(self, num_samples: int) -> None:
        """Nothing: the other server knows."""

    def score(self, request: ScoringRequest) -> Future[list[ScoredCompletion]]:
        """Send completions to be scored; the future fails as an engine's does. As `submit`."""
        assert not request.with_logits, "logits do not travel; see routing.check_comparable"
        self._check_reachable()
        call, future = _Call(request.request_id, "Score"), uncancellable_future()
        self._run(call, self._score(request, future, call))
        return future

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request's calls; unknown ids are ignored."""
        self._end((call for call in self._calls if call.request_id == request_id), reason, "")

    def load(self) -> EngineLoad:
        """Say what is on its way to the other server, and whether that can be reached."""
        return EngineLoad(
            num_running=len(self._calls),
            num_waiting=0,
            max_num_seqs=self.model.max_num_seqs,
            is_alive=not self.why_lost and not self._is_stopping,
            num_unaccounted=0,
        )

    def _check_reachable(self) -> None:
        if self._is_stopping:
            raise EngineStoppedError("the server is stopping")
        if self.why_lost:
            raise EngineStoppedError(f"the teacher at {self.address} is lost: {self.why_lost}")

    # -- calls ------------------------------------------------------------------------------

    def _run(self, call: _Call, work: Coroutine[Any, Any, None]) -> None:
        call.task = self._loop.create_task(work)
        self._calls.add(call)
        call.task.add_done_callback(lambda task: self._calls.discard(call))

    def _end(self, calls: Iterable[_Call], reason: FinishReason, text: str) -> None:
        for call in list(calls):
            assert call.task is not None
            call.reason, call.text = reason, text
            # A task that is cancelled before it began would never say how the call ended.
            if call.is_begun:
                call.task.cancel()

    async def _generate(self, request: GenerationRequest, sink: EventSink, call: _Call) -> None:
        answer = AnswerEvents(request.sampling.num_samples)
        reason, text = FinishReason.ERROR, "the stream of the teacher's server ended too early"
        try:
            with self._explained(call):
                async for response in self._stub.Generate(
                    to_generate(request), **self._options(_timeout_s(request.deadline_s))
                ):
                    sink(answer.take(response))
        except _CallFailedError as error:
            reason, text = error.reason, str(error)
        sink(answer.end(reason, text))

    async def _score(
        self, request: ScoringRequest, future: Future[list[ScoredCompletion]], call: _Call
    ) -> None:
        timeout_s = min(_timeout_s(request.deadline_s), self._scoring_timeout_s)
        try:
            with self._explained(call):
                response = await self._stub.Score(to_score(request), **self._options(timeout_s))
                scored = from_score(response, request)
        except _CallFailedError as error:
            future.set_exception(scoring_error(error.reason, str(error)))
        else:
            future.set_result(scored)

    @contextmanager
    def _explained(self, call: _Call) -> Iterator[None]:
        """Count how a call ends; whatever goes wrong in it is a _CallFailedError."""
        code, failure = "OK", None
        try:
            call.is_begun = True
            if call.reason is not None:
                raise asyncio.CancelledError
            yield
        except asyncio.CancelledError:  # by us, or by the server
            code = grpc.StatusCode.CANCELLED.name
            text = call.text or "the call was cancelled"
            failure = _CallFailedError(call.reason or FinishReason.ERROR, text)
        except grpc.RpcError as error:
            code = error.code().name
            failure = _CallFailedError(_reason(error), self._told(error))
        except Exception as error:
            # What the other server sent is no answer; nobody but those who wait may be harmed.
            logger.exception("a response of the teacher at %s makes no sense", self.address)
            code = grpc.StatusCode.INTERNAL.name
            failure = _CallFailedError(FinishReason.ERROR, f"no answer of the teacher: {error}")
        self._on_call(call.rpc, code)
        if failure is not None:
            raise failure

    def _told(self, error: grpc.RpcError) -> str:
        return f"the teacher at {self.address}: {' '.join(explain(error).split())}"

    def _options(self, timeout_s: float) -> dict[str, Any]:
        return {
            "timeout": timeout_s if math.isfinite(timeout_s) else None,
            "metadata": self._metadata,
        }

    # -- the connection ---------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        while True:
            self._note(*await self._why_not())
            await asyncio.sleep(self._probe_period_s)

    def _note(self, why_lost: str, is_silent: bool) -> None:
        """Remember whether the teacher can be reached, and end what waits for a silent one.

        One that drains answers what it has taken; where a connection breaks, its calls end anyway.
        """
        if is_silent:
            self._end(self._calls, FinishReason.SHUTDOWN, f"the teacher is lost: {why_lost}")
        if why_lost and not self.why_lost:
            logger.warning("the teacher at %s is lost: %s", self.address, why_lost)
        if self.why_lost and not why_lost:
            logger.info("the teacher at %s is there", self.address)
        self.why_lost = why_lost

    async def _why_not(self) -> tuple[str, bool]:
        """Return why the teacher cannot be used, empty if it can; and whether it says nothing."""
        why, is_silent, is_answered = "", False, True
        for _ in range(_NUM_PROBES):
            try:
                if self._channel is None:
                    await self._connect()
                if not (why := await self._probe()):
                    return "", False
            except grpc.RpcError as error:
                is_answered = False
                is_silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                why = " ".join(explain(error).split())
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    self.reconnect()
            except (OSError, UserError, ValueError) as error:  # of the credentials' files
                why = str(error)
            except asyncio.CancelledError:
                if self._is_stopping:
                    raise
                why = "it cancelled a probe"
            except Exception:
                # Without its watch the teacher would stay what it was for ever.
                logger.exception("a probe of the teacher at %s failed", self.address)
                why = "its probe failed; see the server's log"
        if not is_answered:
            # Certificates that are out of date, here or there, look as if nobody were there.
            self.reconnect()
        return why, is_silent

    async def _probe(self) -> str:
        options = {"timeout": PROBE_TIMEOUT_S}
        request = health_pb2.HealthCheckRequest(service=HEALTH_NAME)
        health = await self._health.Check(request, **options)
        if health.status != health_pb2.HealthCheckResponse.SERVING:
            return "it is not serving"
        models = await self._stub.GetModels(
            pb.GetModelsRequest(), metadata=self._metadata, **options
        )
        return self._take_model(models)

    def _take_model(self, response: pb.GetModelsResponse) -> str:
        """Remember what the teacher is, and say why it cannot be ours; empty if it can."""
        try:
            model = teacher_of(response, self.tokenizer_hash)
        except UserError as error:
            return str(error)
        self.model = model
        self.model.address = self.address
        return ""

    async def _connect(self) -> None:
        endpoint = self._open_endpoint()
        self._metadata = endpoint.metadata()
        self._channel = endpoint.open_async()
        self._stub = InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def reconnect(self) -> None:
        """Have the next probe connect anew, with the credentials of then; what runs may end."""
        channel, self._channel = self._channel, None
        if channel is not None:
            closing = self._loop.create_task(channel.close(_LAST_CALLS_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _stop(self) -> None:
        self._is_stopping = True
        self._end(self._calls, FinishReason.SHUTDOWN, "the server is stopping")
        self._watch.cancel()
        tasks = [self._watch, *(call.task for call in self._calls if call.task is not None)]
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reconnect()
        await asyncio.gather(*self._closing)


def _reason(error: grpc.RpcError) -> FinishReason:
    """Return how samples end with a call; what an operator aborted there is not to be repeated."""
    if error.details() == AbortedError.TEXT:
        return FinishReason.ERROR
    return _REASONS.get(error.code(), FinishReason.ERROR)


def teacher_of(response: pb.GetModelsResponse, tokenizer_hash: str) -> pb.Model:
    """Return the teacher among a server's models.

    Raises:
        UserError: there is none that is loaded there, or it has another tokenizer.
    """
    found = [model for model in response.models if model.role == ROLE and not model.address]
    if not found:
        raise UserError("the server there has no teacher of its own")
    if found[0].tokenizer_hash != tokenizer_hash:
        raise UserError(
            f"the teacher there has the tokenizer {one_line(found[0].tokenizer_hash)}, the student "
            f"has {tokenizer_hash}: their token ids mean different texts"
        )
    return found[0]


def _timeout_s(deadline_s: float | None) -> float:
    """Return the seconds that a call may take; infinity without a deadline."""
    if deadline_s is None:
        return math.inf
    left_s = max(deadline_s - time.monotonic(), 0.0)
    return left_s - min(left_s * _RESERVE_SHARE, _MAX_RESERVE_S)
