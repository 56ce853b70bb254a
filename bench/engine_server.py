"""A real `tandem serve` process, and streams from it through grpc.aio, timed at the client."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from bundle.errors import UserError
from demo import Series, scrape
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from serve.client import CHANNEL_OPTIONS

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[dict[str, str]]:
    """Run `tandem serve` with `flags` on free ports; yields its `address` and `metrics_url`.

    Raises UserError, with the server's log, when it does not become ready, or ends otherwise than
    by SIGTERM with exit code 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ready_file, log_path = Path(scratch) / "ready.json", Path(scratch) / "server.log"
        command = [sys.executable, "-m", "tandem", "serve", *flags]
        command += ["--port", "0", "--metrics-port", "0", "--ready-file", str(ready_file)]
        with log_path.open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _wait_ready(server, ready_file, log_path)
        finally:
            code = _stop(server)
        if code != 0:
            raise UserError(f"the server ended with exit code {code}: {log_path.read_text()}")


def _wait_ready(server: subprocess.Popen[bytes], ready_file: Path, log: Path) -> dict[str, str]:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not ready_file.exists():
        if server.poll() is not None or time.monotonic() > deadline_s:
            raise UserError(f"the server did not become ready: {log.read_text()}")
        time.sleep(0.05)
    ready: dict[str, str] = json.loads(ready_file.read_text())
    return ready


def _stop(server: subprocess.Popen[bytes]) -> int:
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


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
        return scrape(self._ready["metrics_url"])

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
