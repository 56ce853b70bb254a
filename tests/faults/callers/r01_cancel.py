"""Clients cancel at a random token: nothing lost or duplicated, the engine stops within two steps.

Of 10,000 streams 30 % are cancelled. What a cancelled stream has brought is a beginning of the
answer. Steps, of 3 ms each as a small student's, count from when the cancel has reached the call's
handler. Memory: at most 256
bytes a cancel, by the slope of what is resident over waves of streams; and no object of Python's.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.rpc.replay import Replays
from tests.faults.memory import Held, held, slope
from tests.faults.paced import EngineWatch, PacedBackend
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of, send

NUM_STREAMS = {Size.CI: 300, Size.FULL: 10_000}
NUM_WAVES = {Size.CI: 3, Size.FULL: 20}
CANCELLED_SHARE = 0.3
MAX_STEPS = 2
MAX_BYTES_PER_CANCEL = 256
# A leak of one object a cancel is 1.
MAX_OBJECTS_PER_CANCEL = 0.5
NUM_TEMPLATES = 50
# Short ones, or 10,000 take too long; sampled, so that no two kinds have the same tokens.
SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=12, temperature=1.0)


class Cancels:
    """Sends requests and cancels a share of the streams behind any of their events."""

    def __init__(self) -> None:
        self.num_cancelled = 0
        self._rng = random.Random(1)

    async def send(
        self, client: AsyncClient, request: pb.GenerateRequest, journal: Journal
    ) -> None:
        if self._rng.random() >= CANCELLED_SHARE:
            await send(client, request, journal)
            return
        self.num_cancelled += 1
        journal.sent(request)
        last_event = self._rng.randint(0, request.sampling.max_tokens)
        async with client.generate(request) as stream:
            for _ in range(last_event):
                if (event := await anext(stream, None)) is None:
                    break
                journal.received(request.request_id, event)
        journal.ended(request.request_id, "CANCELLED")


class Stops:
    """Counts, for every sample that a cancel ended, the steps that its engine began meanwhile."""

    def __init__(self, rig: Rig) -> None:
        self.num_steps: list[int] = []
        self._arrived: dict[str, list[int]] = {}
        self._models = rig.engines.loaded
        self._watches = [EngineWatch(model.engine, self._on_end) for model in self._models]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note when a call's handler is left; engines hear of it afterwards."""
        leave = Replays.leave
        arrived = self._on_arrival

        async def noted(replays: Replays, key: Any, recording: Any) -> None:
            if not recording.is_over:
                arrived(key.request_id)
            await leave(replays, key, recording)

        with patch.object(Replays, "leave", noted):
            yield

    def forget(self) -> None:
        """Let go of what has ended, so that the memory is not this row's own."""
        while any(model.engine.load().num_running for model in self._models):
            time.sleep(0.01)
        self._arrived.clear()

    def _counts(self) -> list[int]:
        return [watch.num_steps for watch in self._watches]

    def _on_arrival(self, request_id: str) -> None:
        self._arrived[request_id] = self._counts()

    def _on_end(self, request: GenerationRequest, reason: FinishReason) -> None:
        if reason is not FinishReason.CANCELLED:
            return
        request_id = request.request_id.partition(" ")[0]
        role = request.request_id.rpartition(" ")[2]
        place = ["student", "teacher"].index(role)
        self.num_steps.append(self._counts()[place] - self._arrived[request_id][place])


def run(size: Size) -> RowResult:
    """Cancel a share of the streams, in waves."""
    result = RowResult("R1", "client cancels at a random token")
    cancels = Cancels()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        rig = stack.enter_context(Rig(Path(folder), max_replays=0, make_backend=PacedBackend))
        stops = Stops(rig)
        stack.enter_context(stops.watching())
        reference = rig.drive(_requests(NUM_TEMPLATES), "reference")
        rig.drive(_requests(2 * NUM_TEMPLATES), "warm", send=cancels.send)
        cancels.num_cancelled = 0
        journal, waves = _drive_waves(rig, cancels, stops, size)
        ledger = rig.ledger(journal, reference)
        result.add(ledger)
        odd = ledger.codes.keys() - {"OK", "CANCELLED"}
        result.demand(not odd, f"calls ended with {sorted(odd)}")
        result.leaks = rig.leaks()
    _judge(result, size, cancels.num_cancelled, stops.num_steps, waves)
    return result


def _requests(count: int) -> Iterator[pb.GenerateRequest]:
    return iter(requests_of(count, num_templates=NUM_TEMPLATES, sampling=SAMPLING))


def _drive_waves(rig: Rig, cancels: Cancels, stops: Stops, size: Size) -> tuple[Path, list[Held]]:
    """Return the journal of all waves, and what was held behind each."""
    requests, waves = _requests(NUM_STREAMS[size]), []
    for _ in range(NUM_WAVES[size]):
        wave = islice(requests, NUM_STREAMS[size] // NUM_WAVES[size])
        journal = rig.drive(wave, "cancelled", send=cancels.send)
        stops.forget()
        waves.append(held())
    return journal, waves


def _judge(
    result: RowResult, size: Size, num_cancelled: int, num_steps: list[int], waves: list[Held]
) -> None:
    per_wave = num_cancelled / len(waves)
    num_bytes = slope([wave.num_bytes for wave in waves]) / per_wave
    num_objects = slope([wave.num_objects for wave in waves]) / per_wave
    result.measured = {
        "num_cancelled": num_cancelled,
        "num_samples_cancelled": len(num_steps),
        "max_steps_after_cancel": max(num_steps, default=0),
        "samples_by_steps": dict(sorted(Counter(num_steps).items())),
        "bytes_per_cancel": num_bytes,
        "objects_per_cancel": num_objects,
    }
    count = NUM_STREAMS[size]
    result.demand(num_cancelled > count // 5, f"only {num_cancelled} of {count} were cancelled")
    result.demand(len(num_steps) > count // 10, f"only {len(num_steps)} samples ran when cancelled")
    # A busy machine keeps the loop from telling the engine for some steps now and then.
    most = max(num_steps, default=0)
    result.demand(most <= MAX_STEPS, f"{most} steps later", is_timed=True)
    num_late = sum(count > MAX_STEPS for count in num_steps)
    text = f"{num_late} of {len(num_steps)} samples ran on for more than {MAX_STEPS} steps"
    result.demand(num_late * 20 <= len(num_steps), text)
    # In a process of its own alone: what other tests left behind comes and goes meanwhile.
    text = f"{num_objects:.2f} objects a cancel"
    result.demand(num_objects <= MAX_OBJECTS_PER_CANCEL, text, is_timed=True)
    if size is Size.FULL:  # 300 streams do not fill the pages that memory is counted in
        result.demand(num_bytes <= MAX_BYTES_PER_CANCEL, f"{num_bytes:.0f} bytes a cancel")
