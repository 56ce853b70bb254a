"""A Generate call at the client: its events as they come, or the whole of it as a `Generation`.

`IncompleteStreamError` is the one error here: a stream without its last event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.client.channel import Attempts
from serve.errors import TandemError


class IncompleteStreamError(TandemError):
    """A stream ended without Usage: samples may be missing."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a stream came to: the student's samples by index, then the teacher's.

    `agreement` is None where no answers were extracted.
    """

    samples: tuple[pb.Sample, ...]
    agreement: pb.Agreement | None
    usage: pb.Usage


@dataclass(slots=True)
class _Parts:
    """The final events of a stream so far."""

    samples: list[pb.Sample] = field(default_factory=list)
    agreement: pb.Agreement | None = None
    usage: pb.Usage | None = None

    def take(self, event: pb.GenerateResponse) -> pb.GenerateResponse:
        kind = event.WhichOneof("event")
        if kind == "complete":
            self.samples.append(event.complete.sample)
        elif kind == "agreement":
            self.agreement = event.agreement
        elif kind == "usage":
            self.usage = event.usage
        return event

    def generation(self) -> Generation:
        if self.usage is None:
            raise IncompleteStreamError(
                f"the stream ended without Usage behind {len(self.samples)} complete samples; "
                "there may be more: ask again"
            )
        ordered = sorted(self.samples, key=lambda sample: (sample.role, sample.index))
        return Generation(tuple(ordered), self.agreement, self.usage)


class GenerateStream:
    """The events of one call: iterate it, or take its `result`.

    Leaving a `with` block, `cancel` and dropping the stream all end the call at the server, which
    frees its slots; reading on raises `grpc.RpcError` (CANCELLED).
    """

    def __init__(self, begin: Callable[[], Any], attempts: Attempts) -> None:
        """Begin the call, which `begin` begins again where an attempt had no event."""
        self._begin = begin
        self._attempts: Attempts | None = attempts
        self._is_cancelled = threading.Event()
        self._call = begin()
        self._parts = _Parts()

    def __iter__(self) -> GenerateStream:
        return self

    def __next__(self) -> pb.GenerateResponse:
        """Wait for the next event; `grpc.RpcError` when the call fails."""
        while True:
            try:
                event = next(self._call)
            except grpc.RpcError as error:
                if not self._begin_again(error):
                    raise
            else:
                if self._attempts is not None:
                    self._attempts.succeeded()
                    self._attempts = None
                return self._parts.take(event)

    def _begin_again(self, error: grpc.RpcError) -> bool:
        """Begin the call again behind a pause, unless it had an event, or was cancelled."""
        pause_s = None if self._attempts is None else self._attempts.pause_s(error)
        if pause_s is None or self._is_cancelled.wait(pause_s):
            return False
        self._call = self._begin()
        if self._is_cancelled.is_set():
            self._call.cancel()
        return True

    def result(self) -> Generation:
        """Read what is left; `IncompleteStreamError` if Usage did not come, `grpc.RpcError`."""
        for _ in self:
            pass
        return self._parts.generation()

    def cancel(self) -> None:
        """End the call, from any thread; without effect on one that has ended."""
        self._is_cancelled.set()
        self._call.cancel()

    def close(self) -> None:
        """Do as `cancel`: the name that generators and `contextlib.closing` have for it."""
        self.cancel()

    def __enter__(self) -> GenerateStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncGenerateStream:
    """As `GenerateStream`, on the event loop.

    A task that reads when another one cancels the call gets `asyncio.CancelledError`, as
    everywhere in grpc.aio; cancelling the reading task ends the call.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._events = aiter(call)
        self._parts = _Parts()

    def __aiter__(self) -> AsyncGenerateStream:
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        """Wait for the next event; `grpc.RpcError` when the call fails."""
        return self._parts.take(await anext(self._events))

    async def result(self) -> Generation:
        """Read what is left; `IncompleteStreamError` if Usage did not come, `grpc.RpcError`."""
        async for _ in self:
            pass
        return self._parts.generation()

    def cancel(self) -> None:
        """End the call; without effect on one that has ended."""
        self._call.cancel()

    def __del__(self) -> None:
        # The call and its iterator refer to each other: grpc would cancel at the next collection.
        self.cancel()

    async def __aenter__(self) -> AsyncGenerateStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
