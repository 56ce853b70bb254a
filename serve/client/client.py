"""The Python client: connects as recommended, retries what is safe, streams, explains failures.

    with Client("127.0.0.1:50051", timeout_s=60) as client:
        response = client.compare(pb.CompareRequest(prompt="Hello"))
        with client.generate(pb.GenerateRequest(prompt="Hello")) as stream:
            for event in stream:                # tokens as they come; break ends the call
                ...
        generation = client.generate(pb.GenerateRequest(prompt="Hello")).result()

    async with AsyncClient("127.0.0.1:50051") as client:
        generation = await client.generate(pb.GenerateRequest(prompt="Hello")).result()

    with ControlClient("127.0.0.1:50052") as control:
        control.set_policy(teacher_weight=0.1)

Each takes `timeout_s`, `token`, `tls` and `max_attempts`. A timeout bounds a whole call, its
retries and their pauses included; None leaves the bound to the server. A request without a
`request_id` is sent with a new one, so that a repetition is answered, not computed again. Calls
raise `grpc.RpcError`; `explain` makes a text of one, `violations` and `retry_delay_s` its parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar
from uuid import uuid4

import grpc
import grpc.aio

from protos.tandem.v1 import control_pb2
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.control_pb2_grpc import ControlServiceStub
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from serve.client.channel import MAX_ATTEMPTS, Attempts, Endpoint, RetryBudget, Tls
from serve.client.streams import (
    AsyncGenerateStream,
    GenerateStream,
)

Identified = TypeVar("Identified", pb.GenerateRequest, pb.CompareRequest, pb.ScoreRequest)


class _Caller(ABC):
    """Calls one service of one server."""

    _stub_type: ClassVar[Any]

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = None,
        token: str | None = None,
        tls: Tls | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        """Prepare to connect; ValueError as `Endpoint`, OSError if a file of `tls` is not there."""
        endpoint = Endpoint(target, token, tls, max_attempts)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._budget = RetryBudget()
        self._metadata = endpoint.metadata()
        self._stub = self._stub_type(self._open(endpoint))

    @abstractmethod
    def _open(self, endpoint: Endpoint) -> Any:
        """Return a channel, kept for `close`."""

    def _options(self, timeout_s: float | None) -> dict[str, Any]:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return {"timeout": timeout_s, "metadata": self._metadata}


class _SyncCaller(_Caller):
    _channel: grpc.Channel

    def _open(self, endpoint: Endpoint) -> grpc.Channel:
        self._channel = endpoint.open()
        return self._channel

    def connect(self, timeout_s: float) -> bool:
        """Wait for a connection; False where there is none yet at the end of that time."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout_s)
        except grpc.FutureTimeoutError:
            return False
        finally:
            ready.cancel()
        return True

    def close(self) -> None:
        """Disconnect; calls that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Client(_SyncCaller):
    """Calls the InferenceService of one server; may be shared by threads."""

    _stub_type = InferenceServiceStub

    def compare(
        self, request: pb.CompareRequest, timeout_s: float | None = None
    ) -> pb.CompareResponse:
        response: pb.CompareResponse = self._stub.Compare(
            _identified(request), **self._options(timeout_s)
        )
        return response

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> GenerateStream:
        """Send the request and return its events, which raise what goes wrong."""
        identified = _identified(request)
        options = self._options(timeout_s)
        attempts = Attempts(self._max_attempts, self._budget, options["timeout"])

        def begin() -> Any:
            return self._stub.Generate(identified, **options | {"timeout": attempts.left_s})

        return GenerateStream(begin, attempts)

    def score(self, request: pb.ScoreRequest, timeout_s: float | None = None) -> pb.ScoreResponse:
        response: pb.ScoreResponse = self._stub.Score(
            _identified(request), **self._options(timeout_s)
        )
        return response

    def get_models(self, timeout_s: float | None = None) -> pb.GetModelsResponse:
        response: pb.GetModelsResponse = self._stub.GetModels(
            pb.GetModelsRequest(), **self._options(timeout_s)
        )
        return response


class AsyncClient(_Caller):
    """As `Client`, on the running event loop."""

    _stub_type = InferenceServiceStub
    _channel: grpc.aio.Channel

    def _open(self, endpoint: Endpoint) -> grpc.aio.Channel:
        self._channel = endpoint.open_async()
        return self._channel

    async def wait_connected(self) -> None:
        """Wait for a connection, for ever if need be."""
        await self._channel.channel_ready()

    async def compare(
        self, request: pb.CompareRequest, timeout_s: float | None = None
    ) -> pb.CompareResponse:
        response: pb.CompareResponse = await self._stub.Compare(
            _identified(request), **self._options(timeout_s)
        )
        return response

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerateStream:
        """Send the request and return its events, which raise what goes wrong."""
        return AsyncGenerateStream(
            self._stub.Generate(_identified(request), **self._options(timeout_s))
        )

    async def score(
        self, request: pb.ScoreRequest, timeout_s: float | None = None
    ) -> pb.ScoreResponse:
        response: pb.ScoreResponse = await self._stub.Score(
            _identified(request), **self._options(timeout_s)
        )
        return response

    async def get_models(self, timeout_s: float | None = None) -> pb.GetModelsResponse:
        response: pb.GetModelsResponse = await self._stub.GetModels(
            pb.GetModelsRequest(), **self._options(timeout_s)
        )
        return response

    async def close(self) -> None:
        """Disconnect; calls that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class ControlClient(_SyncCaller):
    """Calls the ControlService, at the server's control address; what changes is sent once."""

    _stub_type = ControlServiceStub

    def status(self, timeout_s: float | None = None) -> control_pb2.GetStatusResponse:
        response: control_pb2.GetStatusResponse = self._call(
            "GetStatus", control_pb2.GetStatusRequest(), timeout_s
        )
        return response

    def policy(self) -> control_pb2.Policy:
        policy: control_pb2.Policy = self._call("GetPolicy", control_pb2.GetPolicyRequest()).policy
        return policy

    def set_policy(
        self,
        *,
        student_weight: float | None = None,
        teacher_weight: float | None = None,
        shadow_rate: float | None = None,
        expected_revision: int | None = None,
    ) -> control_pb2.Policy:
        """Change what is given, and return the policy that is then in force.

        `grpc.RpcError` with FAILED_PRECONDITION where `expected_revision` is not the current one.
        """
        request = control_pb2.SetPolicyRequest(
            student_weight=student_weight,
            teacher_weight=teacher_weight,
            shadow_rate=shadow_rate,
            expected_revision=expected_revision,
        )
        policy: control_pb2.Policy = self._call("SetPolicy", request).policy
        return policy

    def drain(self) -> None:
        """Have the server end as by SIGTERM; returns at once."""
        self._call("Drain", control_pb2.DrainRequest())

    def abort(self, request_id: str) -> None:
        """End a running request; `grpc.RpcError` with NOT_FOUND where none has that id."""
        self._call("Abort", control_pb2.AbortRequest(request_id=request_id))

    def _call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        return getattr(self._stub, method)(request, **self._options(timeout_s))


def _identified(request: Identified) -> Identified:
    """Return the request with an id: itself, or a copy with a new one."""
    if request.request_id:
        return request
    identified = type(request)(request_id=uuid4().hex)
    identified.MergeFrom(request)
    return identified
