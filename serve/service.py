"""`tandem.v1.InferenceService` on the wire: messages in, messages out, nothing decided in between.

Calls arrive as raw bytes, because grpcio answers bytes that it cannot parse with UNKNOWN and a
Python text. `_guard` surrounds every call: it counts, and maps exceptions to a status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve import replies
from serve.arms import ArmResult, Chunk
from serve.coordinator import Coordinator, running
from serve.errors import EngineStoppedError, ModelsNotComparableError, QueueFullError
from serve.metrics import ServerMetrics
from serve.specs import OTHER_TASK, GenerationSpec
from serve.statuses import abort, status_of
from serve.validation import parse, validate_compare, validate_generate, validate_score

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Call:
    """One call while it runs: when it came, by when it must end (monotonic), and its labels."""

    arrival_s: float
    deadline_s: float | None
    route: str = "none"
    task: str = OTHER_TASK

    @classmethod
    def begin(cls, context: Context) -> _Call:
        arrival_s, remaining_s = time.monotonic(), context.time_remaining()
        return cls(arrival_s, None if remaining_s is None else arrival_s + remaining_s)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.arrival_s

    def label(self, spec: GenerationSpec) -> None:
        self.route, self.task = spec.route.value, spec.evaluation.task

    def code_when_cancelled(self) -> grpc.StatusCode:
        """Tell a client that gave up from one whose deadline passed: grpc cancels both."""
        is_past_deadline = self.deadline_s is not None and time.monotonic() >= self.deadline_s
        if is_past_deadline:
            return grpc.StatusCode.DEADLINE_EXCEEDED
        return grpc.StatusCode.CANCELLED


_serialize = methodcaller("SerializeToString")

Method = Callable[[_Call, bytes, Context], Awaitable[Any]]


class InferenceService:
    """Translates between messages and a `Coordinator`; lives on one asyncio loop."""

    def __init__(self, coordinator: Coordinator, metrics: ServerMetrics) -> None:
        self._coordinator = coordinator
        self._limits = coordinator.limits
        self._metrics = metrics

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, tuple[Any, Method]] = {
            "Generate": (stream, self._generate),
            "Compare": (unary, self._compare),
            "Score": (unary, self._score),
            "GetModels": (unary, self._get_models),
        }
        # Without a deserializer a handler gets the raw bytes.
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                rpc: make(self._guard(rpc, method), None, _serialize)
                for rpc, (make, method) in methods.items()
            },
        )

    def _guard(self, rpc: str, method: Method) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def handle(data: bytes, context: Context) -> Any:
            call, code = _Call.begin(context), grpc.StatusCode.OK
            try:
                return await method(call, data, context)
            except asyncio.CancelledError:
                code = call.code_when_cancelled()
                raise
            except Exception as error:  # mapped, logged if unexpected, and sent: nothing is lost
                status = status_of(error)
                code = status.code
                self._count_rejection(error)
                await abort(context, status)
            finally:
                self._metrics.requests.labels(rpc, call.route, code.name, call.task).inc()

        return handle

    def _count_rejection(self, error: Exception) -> None:
        if isinstance(error, QueueFullError):
            self._metrics.admission_rejections.labels("queue_full").inc()
        elif isinstance(error, EngineStoppedError):
            self._metrics.admission_rejections.labels("draining").inc()

    async def _generate(self, call: _Call, data: bytes, context: Context) -> None:
        """Write responses as they come, from one queue that all arms feed; None ends it."""
        spec = validate_generate(parse(data, pb.GenerateRequest), self._limits)
        call.label(spec)
        responses: asyncio.Queue[pb.GenerateResponse | None] = asyncio.Queue()
        async with running(self._fill(responses, call, spec)) as tasks:
            while (response := await responses.get()) is not None:
                await context.write(response)
            await tasks[0]

    async def _fill(
        self,
        responses: asyncio.Queue[pb.GenerateResponse | None],
        call: _Call,
        spec: GenerationSpec,
    ) -> None:
        emit = responses.put_nowait

        def on_chunk(chunk: Chunk) -> None:
            if spec.output.stream:
                emit(replies.to_chunk(chunk, spec))

        def on_arm(arm: ArmResult) -> None:
            for sample in arm.samples:
                complete = pb.Complete(sample=replies.to_sample(sample, spec))
                emit(pb.GenerateResponse(complete=complete))

        try:
            answer = await self._coordinator.answer(spec, call.deadline_s, on_chunk, on_arm)
            if answer.agreement is not None:
                agreement = replies.to_agreement(answer.agreement)
                emit(pb.GenerateResponse(agreement=agreement))
            usage = replies.to_usage(spec, answer.arms, call.seconds)
            emit(pb.GenerateResponse(usage=usage))
        finally:
            responses.put_nowait(None)

    async def _compare(self, call: _Call, data: bytes, context: Context) -> pb.CompareResponse:
        spec = validate_compare(parse(data, pb.CompareRequest), self._limits)
        call.label(spec)
        loaded = self._coordinator.engines.loaded
        if len(loaded) < 2:
            raise ModelsNotComparableError(f"only the {loaded[0].role.value} is loaded")
        answer = await self._coordinator.answer(spec, call.deadline_s, _ignore, _ignore)
        return pb.CompareResponse(
            samples=[replies.to_sample(s, spec) for arm in answer.arms for s in arm.samples],
            agreement=replies.to_agreement(answer.agreement) if answer.agreement else None,
            usage=replies.to_usage(spec, answer.arms, call.seconds),
        )

    async def _score(self, call: _Call, data: bytes, context: Context) -> pb.ScoreResponse:
        spec = validate_score(parse(data, pb.ScoreRequest), self._limits)
        answer = await self._coordinator.score(spec, call.deadline_s)
        return pb.ScoreResponse(
            scores=[replies.to_score(score, spec) for score in answer.scores],
            usage=replies.to_score_usage(spec, answer.requests, call.seconds),
        )

    async def _get_models(self, call: _Call, data: bytes, context: Context) -> pb.GetModelsResponse:
        parse(data, pb.GetModelsRequest)
        loaded = self._coordinator.engines.loaded
        return pb.GetModelsResponse(models=[replies.to_model(model) for model in loaded])


def _ignore(part: Chunk | ArmResult) -> None:
    """Compare returns everything at its end."""
