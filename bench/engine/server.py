"""Streams from a `tandem serve` process through grpc.aio, timed at the client."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from loadtest.server_metrics import Series, scrape
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from serve.client import CHANNEL_OPTIONS


@dataclass(slots=True)
class Stream:
    """One Generate call: when each token reached the client, and when the call ended."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    is_shadowed: bool = False

    @property
    def latencies_s(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times_s)]


def student_request(
    prompt: Sequence[int], max_tokens: int, seed: int, *, is_shadowed: bool
) -> pb.GenerateRequest:
    """The student streams `max_tokens` with text; shadowed, the teacher scores them afterwards."""
    return pb.GenerateRequest(
        route=pb.ROUTE_STUDENT,
        prompt_token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True),
        divergence=pb.DivergenceOptions(enabled=is_shadowed),
        output=pb.OutputOptions(text=True),
    )


class Wire:
    """A channel to a server on an event loop of its own; use it in a `with`."""

    def __init__(self, ready: dict[str, str]) -> None:
        self._ready = ready
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()

    def __enter__(self) -> Wire:
        self._stub = self._runner.run(self._connect())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _connect(self) -> Any:
        channel = grpc.aio.insecure_channel(self._ready["address"], options=CHANNEL_OPTIONS)
        return InferenceServiceStub(await self._stack.enter_async_context(channel))

    def stream_all(self, requests: Sequence[pb.GenerateRequest]) -> list[Stream]:
        """Run all requests at once."""

        async def run() -> list[Stream]:
            return await asyncio.gather(*(self._stream(request) for request in requests))

        return self._runner.run(run())

    def stream_in_loops(
        self, requests: Sequence[Sequence[pb.GenerateRequest]], *, waits_for_scores: bool
    ) -> list[Stream]:
        """Run each list's requests one after the other, the lists side by side.

        The next request starts at the end of the call, or else with the last token of the one
        before, when its scoring has only begun.
        """

        async def run() -> list[Stream]:
            loops = [self._loop(own, waits_for_scores) for own in requests]
            return list(itertools.chain(*await asyncio.gather(*loops)))

        return self._runner.run(run())

    def scrape(self) -> Series:
        return scrape(self._ready["metrics_url"]).values

    async def _loop(
        self, requests: Sequence[pb.GenerateRequest], waits_for_scores: bool
    ) -> list[Stream]:
        calls = []
        for request in requests:
            is_drawn = asyncio.Event()
            call = asyncio.create_task(self._stream(request, is_drawn))
            calls.append(call)
            if waits_for_scores:
                await call
            else:
                drawn = asyncio.create_task(is_drawn.wait())
                await asyncio.wait((call, drawn), return_when=asyncio.FIRST_COMPLETED)
        return list(await asyncio.gather(*calls))

    async def _stream(
        self, request: pb.GenerateRequest, is_drawn: asyncio.Event | None = None
    ) -> Stream:
        stream = Stream(time.perf_counter())
        max_tokens = request.sampling.max_tokens
        async for response in self._stub.Generate(request):
            kind = response.WhichOneof("event")
            if kind == "tokens":
                now_s = time.perf_counter()
                stream.token_times_s += [now_s] * len(response.tokens.token_ids)
                if is_drawn and len(stream.token_times_s) == max_tokens:
                    is_drawn.set()
            elif kind == "complete":
                sample = response.complete.sample
                stream.is_shadowed = sample.HasField("divergence")
        stream.ended_s = time.perf_counter()
        assert len(stream.token_times_s) == max_tokens, (len(stream.token_times_s), max_tokens)
        assert stream.is_shadowed == request.divergence.enabled, request
        return stream


def mean_step_s(before: Series, after: Series, role: str, phase: str) -> tuple[float, float]:
    """Return the mean of an engine's steps between two scrapes, 0 without any, and their number."""
    labels = frozenset({("role", role), ("phase", phase)})
    seconds, count = (
        after.get((name, labels), 0.0) - before.get((name, labels), 0.0)
        for name in ("tandem_engine_step_seconds_sum", "tandem_engine_step_seconds_count")
    )
    return (seconds / count if count else 0.0), count
