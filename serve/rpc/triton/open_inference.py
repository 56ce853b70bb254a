"""`inference.GRPCInferenceService`, the Open Inference Protocol: what Triton's clients speak.

Translates and nothing else: requests go through `InferenceService.generate`, so limits, statuses,
repeated requests and metrics are those of our own service. What the tensors are is said in
protos/oip/grpc_service.proto.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing

import grpc

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import EngineStoppedError, InvalidFieldError, QueueFullError, StalledError
from serve.pair.coordinator import Coordinator
from serve.pair.routing import are_comparable
from serve.pair.served import Role
from serve.rpc.calls import Call, CallFailedError, CallGuard, Context, serialize, unary
from serve.rpc.decoding import parse
from serve.rpc.gate import request_slot
from serve.rpc.statuses import Status, abort, status_of
from serve.rpc.triton.models import NAME, VERSION, to_config, to_metadata, to_role
from serve.rpc.triton.requests import FINAL, Inference, to_inference

SERVICE_NAME = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
MAX_REQUESTS_PER_STREAM = 64
# Of all messages whose requests run on one stream; behind that nothing more is read.
MAX_BYTES_PER_STREAM = 4 << 20
_RETRY_AFTER_S = 1.0

Generate = Callable[[Call, pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse, None]]
_STOPPED = status_of(EngineStoppedError("the server is draining"))

Write = Callable[[oip.ModelStreamInferResponse], Awaitable[None]]


class OpenInferenceService:
    """Translates between the protocol and our own service; lives on one asyncio loop.

    `health` says by name what is serving: "readiness", "model.student", "model.teacher".
    """

    def __init__(
        self,
        generate: Generate,
        coordinator: Coordinator,
        guard: CallGuard,
        version: str,
        health: Callable[[], Mapping[str, bool]],
    ) -> None:
        self._generate = generate
        self._engines = coordinator.engines
        limits = coordinator.limits
        self._max_elements = max(limits.max_model_len, limits.max_stop_token_ids)
        self._guard = guard
        self._version = version
        self._health = health
        self._readers: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def close(self) -> None:
        """Read no more from streams: they end with UNAVAILABLE when what runs on them has ended.

        Those that come later, too: grpc would end a read on a listener that closes with INTERNAL.
        """
        self._is_closed = True
        for reader in self._readers:
            reader.cancel()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
        }
        stream: grpc.RpcMethodHandler[bytes, oip.ModelStreamInferResponse] = (
            grpc.stream_stream_rpc_method_handler(self._model_stream_infer, None, serialize)
        )
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                **{rpc: unary(self._guard.surround(rpc, m)) for rpc, m in methods.items()},
                "ModelStreamInfer": stream,
            },
        )

    # Health and description

    async def _server_live(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ServerLiveResponse:
        parse(data, oip.ServerLiveRequest)
        return oip.ServerLiveResponse(live=True)

    async def _server_ready(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ServerReadyResponse:
        parse(data, oip.ServerReadyRequest)
        return oip.ServerReadyResponse(ready=self._health()["readiness"])

    async def _model_ready(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ModelReadyResponse:
        request = parse(data, oip.ModelReadyRequest)
        role = self._loaded(request.name, request.version)
        return oip.ModelReadyResponse(ready=self._is_ready(role))

    async def _server_metadata(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ServerMetadataResponse:
        parse(data, oip.ServerMetadataRequest)
        return oip.ServerMetadataResponse(name=NAME, version=self._version)

    async def _model_metadata(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ModelMetadataResponse:
        request = parse(data, oip.ModelMetadataRequest)
        role = self._loaded(request.name, request.version)
        return to_metadata(role, has_k3=self._has_k3())

    async def _model_config(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ModelConfigResponse:
        request = parse(data, oip.ModelConfigRequest)
        role = self._loaded(request.name, request.version)
        return oip.ModelConfigResponse(config=to_config(role, has_k3=self._has_k3()))

    async def _repository_index(
        self, call: Call, data: bytes, context: Context
    ) -> oip.RepositoryIndexResponse:
        request = parse(data, oip.RepositoryIndexRequest)
        if request.repository_name:
            raise InvalidFieldError.of("repository_name", "must be empty: there is one repository")
        ready_by_role = {model.role: self._is_ready(model.role) for model in self._engines.loaded}
        return oip.RepositoryIndexResponse(
            models=[
                oip.RepositoryIndexResponse.ModelIndex(
                    name=role.value, version=VERSION, state="READY" if is_ready else "UNAVAILABLE"
                )
                for role, is_ready in ready_by_role.items()
                if is_ready or not request.ready
            ]
        )

    def _loaded(self, name: str, version: str) -> Role:
        """Return a model that is there; ModelNotLoadedError else."""
        return self._engines.get(to_role(name, version)).role

    def _is_ready(self, role: Role) -> bool:
        return self._health()[f"model.{role.value}"]

    def _has_k3(self) -> bool:
        return are_comparable(self._engines.loaded)

    # Inference

    async def _model_infer(
        self, call: Call, data: bytes, context: Context
    ) -> oip.ModelInferResponse:
        source = parse(data, oip.ModelInferRequest)
        inference = self._inference(source, may_stream=False)
        async with aclosing(self._responses(call, inference)) as responses:
            (response,) = [response async for response in responses]
        return response

    def _inference(self, source: oip.ModelInferRequest, *, may_stream: bool) -> Inference:
        return to_inference(source, may_stream=may_stream, max_elements=self._max_elements)

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Answer requests side by side. What ends the call ends all of them."""
        if self._is_closed:
            await abort(context, _STOPPED)
        lock = asyncio.Lock()

        async def write(response: oip.ModelStreamInferResponse) -> None:
            async with lock:
                await self._guard.write(context, response)

        stalled: list[Exception] = []
        try:
            async with asyncio.TaskGroup() as answers:
                reader = answers.create_task(self._read(requests, context, write, answers))
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)
        except* StalledError as errors:
            stalled += errors.exceptions
        if stalled:
            await abort(context, status_of(stalled[0]))
        if reader.cancelled():
            await abort(context, _STOPPED)

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        context: Context,
        write: Write,
        answers: asyncio.TaskGroup,
    ) -> None:
        """Start a task for each request of a stream, but for so many, and bytes, at a time."""
        running = dict[asyncio.Task[None], int]()
        async for data in requests:
            call = self._guard.begin("ModelStreamInfer", context.time_remaining())
            is_full = len(running) >= MAX_REQUESTS_PER_STREAM
            task = answers.create_task(self._answer(call, data, write, is_full=is_full))
            running[task] = len(data)
            task.add_done_callback(running.pop)
            if is_full:
                # The next one is read when this client has been told: what waits is bounded.
                await asyncio.wait([task])
            while sum(running.values()) >= MAX_BYTES_PER_STREAM:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def _answer(self, call: Call, data: bytes, write: Write, *, is_full: bool) -> None:
        """Write the responses to one request of a stream, or why there are none."""
        source = oip.ModelInferRequest()
        try:
            with self._guard.watch(call):
                source = parse(data, oip.ModelInferRequest)
                if is_full:
                    raise QueueFullError(
                        f"{MAX_REQUESTS_PER_STREAM} requests of this stream run, the most it may",
                        _RETRY_AFTER_S,
                    )
                with request_slot.get()():
                    inference = self._inference(source, may_stream=True)
                    async with aclosing(self._stream_responses(call, inference)) as responses:
                        async for response in responses:
                            await write(oip.ModelStreamInferResponse(infer_response=response))
        except CallFailedError as failed:
            if isinstance(failed.__cause__, StalledError):
                # Nothing can be written behind what the client left.
                raise failed.__cause__ from None
            await write(_to_error(source, failed.status))

    async def _stream_responses(
        self, call: Call, inference: Inference
    ) -> AsyncGenerator[oip.ModelInferResponse, None]:
        """Yield responses that say which one is the last: an empty one, if that is wanted."""
        is_final = False
        async with aclosing(self._responses(call, inference)) as responses:
            async for response in responses:
                is_last = "finish_reason" in response.parameters
                is_final = is_last and not (inference.wants_empty_final and response.outputs)
                response.parameters[FINAL].bool_param = is_final
                yield response
        if not is_final:
            response = inference.respond_empty()
            response.parameters[FINAL].bool_param = True
            yield response

    async def _responses(
        self, call: Call, inference: Inference
    ) -> AsyncGenerator[oip.ModelInferResponse, None]:
        """Yield chunks of tokens if they are asked for, and at the end what is left to say."""
        if inference.timeout_s is not None:
            call.deadline_s = min(call.deadline_s, call.arrival_s + inference.timeout_s)
        sample, prefix = pb.Sample(), inference.prefix
        with inference.fields_as_given():
            async with aclosing(self._generate(call, inference.request)) as events:
                async for event in events:
                    if event.HasField("tokens"):
                        chunk = event.tokens
                        yield inference.respond(
                            chunk.token_ids, prefix + chunk.text, chunk.logprobs
                        )
                        prefix = ""
                    elif event.HasField("complete"):
                        sample = event.complete.sample
        yield inference.respond_last(sample, prefix)


def _to_error(source: oip.ModelInferRequest, status: Status) -> oip.ModelStreamInferResponse:
    response = oip.ModelInferResponse(model_name=source.model_name, id=source.id)
    response.parameters[FINAL].bool_param = True
    return oip.ModelStreamInferResponse(
        error_message=f"{status.code.name}: {status.message}", infer_response=response
    )
