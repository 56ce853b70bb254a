"""A small client: the recommended channel options, typed calls, readable errors.

    with Client("127.0.0.1:50051") as client:
        response = client.compare(pb.CompareRequest(prompt="Hello"))

Calls raise `grpc.RpcError`; `explain` makes a text of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # The server allows pings this often; a dead server is then noticed within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # 64 samples with log-probabilities of both models exceed the default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)


class Client:
    """Calls one server. `timeout_s` bounds every call that gives none; None waits for ever."""

    def __init__(self, target: str, *, timeout_s: float | None = None) -> None:
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub: Any = InferenceServiceStub(self._channel)
        self._timeout_s = timeout_s

    def compare(
        self, request: pb.CompareRequest, timeout_s: float | None = None
    ) -> pb.CompareResponse:
        response: pb.CompareResponse = self._stub.Compare(request, timeout=self._timeout(timeout_s))
        return response

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> Iterator[pb.GenerateResponse]:
        """Yield the events of a stream; closing the iterator cancels the call."""
        call = self._stub.Generate(request, timeout=self._timeout(timeout_s))
        try:
            yield from call
        finally:
            call.cancel()

    def score(self, request: pb.ScoreRequest, timeout_s: float | None = None) -> pb.ScoreResponse:
        response: pb.ScoreResponse = self._stub.Score(request, timeout=self._timeout(timeout_s))
        return response

    def get_models(self, timeout_s: float | None = None) -> pb.GetModelsResponse:
        response: pb.GetModelsResponse = self._stub.GetModels(
            pb.GetModelsRequest(), timeout=self._timeout(timeout_s)
        )
        return response

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Return the refused fields of a call that failed, path → what is wrong; often none."""
    found: dict[str, str] = {}
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            bad_request = error_details_pb2.BadRequest()
            if detail.Unpack(bad_request):
                found.update({v.field: v.description for v in bad_request.field_violations})
    return found


def explain(error: grpc.RpcError) -> str:
    """Return status code and text of a call that failed, a line per refused field."""
    fields = [f"  {field} {text}" for field, text in violations(error).items()]
    return "\n".join([f"{error.code().name}: {error.details()}"] if not fields else
                     [f"{error.code().name}:", *fields])  # fmt: skip
