"""Clients cancel at a random token: nothing lost or duplicated, the engine stops within two steps.

Of 10,000 streams 30 % are cancelled. What a cancelled stream has brought is a beginning of the
answer. Memory: at most 256 bytes a cancel.
"""

from __future__ import annotations

import random
import resource
import tempfile
from pathlib import Path

from loadtest.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.faults.rig import send as send_whole

NUM_STREAMS = {Size.CI: 300, Size.FULL: 10_000}
CANCELLED_SHARE = 0.3
MAX_BYTES_PER_CANCEL = 256


def run(size: Size) -> RowResult:
    """Cancel a share of the streams, at any of their events."""
    result = RowResult("R1", "client cancels at a random token")
    rng, num_cancelled = random.Random(1), 0

    async def send(client: AsyncClient, request: pb.GenerateRequest, journal: Journal) -> None:
        nonlocal num_cancelled
        if rng.random() >= CANCELLED_SHARE:
            await send_whole(client, request, journal)
            return
        num_cancelled += 1
        journal.sent(request)
        last_event = rng.randint(0, 8)
        async with client.generate(request) as stream:
            for _ in range(last_event):
                if (event := await anext(stream, None)) is None:
                    break
                journal.received(request.request_id, event)
        journal.ended(request.request_id, "CANCELLED")

    with tempfile.TemporaryDirectory() as folder, Rig(Path(folder), max_replays=0) as rig:
        count = NUM_STREAMS[size]
        reference = rig.drive(requests_of(200), "reference")
        rig.drive(requests_of(count // 4), "warm", send=send)
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        num_cancelled = 0
        journal = rig.drive(requests_of(count), "cancelled", send=send)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) * 1024
        result.add(rig.ledger(journal, reference))
        result.leaks = rig.leaks()
        result.measured = {
            "num_cancelled": num_cancelled,
            "bytes_per_cancel": grown / num_cancelled,
        }
        result.demand(num_cancelled > count // 5, f"only {num_cancelled} of {count} were cancelled")
        if size is Size.FULL:
            result.demand(
                grown <= MAX_BYTES_PER_CANCEL * num_cancelled, f"{grown} bytes more at the peak"
            )
    return result
