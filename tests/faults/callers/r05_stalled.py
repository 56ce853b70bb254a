"""32 readers stop reading: others' p99 at most 1.2 times, a bounded buffer, the streams ended.

Their windows are full before the half of their answers is out, and they have no deadline. The
server ends each `max_stall_s` after it took nothing more (30 s by default, shorter here), in which
it holds the rest of the answer and no slot of an engine. Who reads on is told.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1.inference_pb2_grpc import InferenceServiceStub
from tests.faults.callers.latency import NUM_TEMPLATES, Rounds, bystanders, compare_waits
from tests.faults.memory import held
from tests.faults.paced import PacedBackend
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig

NUM_READERS = 32
# The target is of p99. What the tests can tell in a second, on a busy machine, is a blocked loop.
ROUNDS = {Size.CI: Rounds(1, 3, 60, 50, 2.5), Size.FULL: Rounds(10, 10, 300, 99, 1.2)}
MAX_STALL_S = {Size.CI: 3.0, Size.FULL: 5.0}
# Of the time after `max_stall_s`: a second for the status, and what a busy machine takes.
SLACK_S = 30.0
# Messages as Python's objects take several times their size on the wire.
MAX_BUFFER_BYTES = 1 << 20
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1 << 12), ("grpc.http2.bdp_probe", 0))


class Readers:
    """Clients that ask and do not read; `stalling` opens all of them, and sees them ended."""

    def __init__(self, rig: Rig, journal: Path, max_stall_s: float, result: RowResult) -> None:
        self._rig = rig
        self._journal = journal
        self._max_stall_s = max_stall_s
        self._result = result
        self._numbers = itertools.count()
        self.buffers_bytes: list[float] = []
        self.codes: list[str] = []

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Have all of them stalled during the block; behind it the server ends them."""
        before = held()
        requests = [_request(next(self._numbers)) for _ in range(NUM_READERS)]
        channel, calls = self._rig.run(self._open(requests))
        self.buffers_bytes.append((held().num_bytes - before.num_bytes) / NUM_READERS)
        num_stalled = self._rig.server.gate.num_active
        self._result.demand(num_stalled == NUM_READERS, f"only {num_stalled} of them stalled")
        yield
        ended_s = self._rig.run(self._wait_for_the_end())
        limit_s = self._max_stall_s + SLACK_S
        self._result.demand(ended_s <= limit_s, f"their streams still run {ended_s:.1f} s later")
        self.codes += self._rig.run(self._read(requests, calls))
        self._rig.run(channel.close())

    async def _open(self, requests: list[pb.GenerateRequest]) -> tuple[grpc.aio.Channel, list[Any]]:
        """Ask, and wait until the engines are done with the answers."""
        channel = grpc.aio.insecure_channel(self._rig.server.address, SMALL_WINDOW)
        stub = InferenceServiceStub(channel)
        calls = [stub.Generate(request) for request in requests]
        wanted = self._num_done() + len(requests)
        until_s = time.monotonic() + self._max_stall_s
        while self._num_done() < wanted and time.monotonic() < until_s:
            await asyncio.sleep(0.01)
        # The loop has then made all of the 32 answers, and what is measured are stalled readers.
        await self._rig.client.generate(next(bystanders(1))).result()
        return channel, calls

    def _num_done(self) -> float:
        return self._rig.value("samples_total", role="student", finish_reason="length")

    async def _wait_for_the_end(self) -> float:
        started_s = time.monotonic()
        while (
            self._rig.server.gate.num_active
            and time.monotonic() < started_s + self._max_stall_s + SLACK_S
        ):
            await asyncio.sleep(0.01)
        return time.monotonic() - started_s

    async def _read(self, requests: list[pb.GenerateRequest], calls: list[Any]) -> list[str]:
        with Journal(self._journal) as journal:
            for request in requests:
                journal.sent(request)
            return [await journal.follow(*pair) for pair in zip(requests, calls, strict=True)]


def _request(number: int) -> pb.GenerateRequest:
    """Return one with an answer of several windows."""
    return pb.GenerateRequest(
        request_id=f"stalled-{number}",
        route=pb.ROUTE_STUDENT,
        prompt_token_ids=pb.TokenIds(ids=[5, 6, 7]),
        sampling=pb.SamplingParams(num_samples=1, seed=3, max_tokens=60, ignore_eos=True),
        output=pb.OutputOptions(top_logprobs=20),
    )


def run(size: Size) -> RowResult:
    """Measure others beside readers that stall, and without them."""
    result = RowResult("R5", "reader stops reading (32 streams)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"max_num_seqs": NUM_READERS, "max_replays": 0}
        stall = {"max_stall_s": MAX_STALL_S[size]}
        with Rig(folder, make_backend=PacedBackend, **settings, **stall) as rig:
            reference = rig.drive([*bystanders(NUM_TEMPLATES), _request(-1)], "reference")
            readers = Readers(rig, folder / "stalled.jsonl", MAX_STALL_S[size], result)
            others, waits = compare_waits(rig, ROUNDS[size], readers.stalling, "others")
            for journal in (others, folder / "stalled.jsonl"):
                result.add(rig.ledger(journal, reference))
            result.leaks = rig.leaks()
    buffer_bytes = max(readers.buffers_bytes)
    result.measured |= {
        "num_stalled": len(readers.codes),
        "max_stall_s": MAX_STALL_S[size],
        "buffer_bytes_per_reader": buffer_bytes,
    }
    unexpected = set(readers.codes) - {"DEADLINE_EXCEEDED"}
    result.demand(not unexpected, f"stalled streams ended with {sorted(unexpected)}")
    result.demand(buffer_bytes <= MAX_BUFFER_BYTES, f"{buffer_bytes:.0f} bytes held per reader")
    waits.judge(result)
    return result
