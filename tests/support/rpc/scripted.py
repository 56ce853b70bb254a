"""Servers that refuse and answer as a script says."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc

USAGE = pb.GenerateResponse(usage=pb.Usage(seed=7))
AnyScripted = TypeVar("AnyScripted", bound="Scripted")


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Refuses as often as told, each time with a code and a pushback in ms, and then answers."""

    def __init__(
        self,
        refusals: Iterable[tuple[grpc.StatusCode, int | None]] = (),
        events: Iterable[pb.GenerateResponse] = (USAGE,),
    ) -> None:
        self.refusals, self.events = iter(refusals), events
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.is_ended = threading.Event()
        self.target = ""

    def admit(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        metadata = self.metadata = dict(context.invocation_metadata())
        code, pushback_ms = self.verdict(int(metadata.get("grpc-previous-rpc-attempts", "0")))
        if pushback_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback_ms)),))
        if code is not None:
            context.abort(code, "not now")

    def verdict(self, num_before: int) -> tuple[grpc.StatusCode | None, int | None]:
        """Say what to do with a call that was sent so often before."""
        return next(self.refusals, (None, None))

    def Compare(self, request: Any, context: Any) -> pb.CompareResponse:  # noqa: N802
        self.admit(request, context)
        return pb.CompareResponse(samples=[pb.Sample(text=request.prompt)])

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.admit(request, context)
        return pb.ScoreResponse(scores=[pb.Score(role=pb.ROLE_TEACHER)])

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.admit(request, context)
        context.add_callback(self.is_ended.set)
        yield from self.events


@contextmanager
def serving_script(
    service: AnyScripted, credentials: grpc.ServerCredentials | None = None
) -> Iterator[AnyScripted]:
    """Run a server, whose address is the service's `target`."""
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = (
        server.add_secure_port("127.0.0.1:0", credentials)
        if credentials
        else server.add_insecure_port("127.0.0.1:0")
    )
    service.target = f"127.0.0.1:{port}"
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait()
