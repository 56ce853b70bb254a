"""Everybody repeats what was refused: servers see at most 1.3 attempts for each call.

Clients as they ship send five times what a server can do, in an open loop. gRPC's budget for
retries belongs to a process: of each, some 500 refusals are sent again, then only a tenth of what
succeeds. So what a storm comes to depends on how many calls a process makes, and so it is
measured: attempts are counted by the server, from the first call of a process on.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from serve.client.channel import MAX_ATTEMPTS
from tests.faults.callers.r03_overload import (
    MAX_NUM_SEQS,
    NUM_TEMPLATES,
    OVERLOAD,
    measure_peak,
    overloadable,
    requests,
)
from tests.faults.calls import Outcome, call_in_turns, call_on_time, codes, quiet_collector
from tests.faults.result import RowResult, Size
from tests.faults.served import holdings, leaks
from tests.support.processes import running

MAX_AMPLIFICATION = 1.3
NUM_CALLS = {Size.CI: 2_500, Size.FULL: 20_000}
Requests = Iterator[pb.GenerateRequest]
PEAK_S = {Size.CI: 0.5, Size.FULL: 3.0}
# Short answers, so that there are many calls in a short time.
SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=8, temperature=1, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Storm:
    """Calls as callers see them, and attempts as the server does."""

    outcomes: list[Outcome]
    num_attempts: int

    @property
    def amplification(self) -> float:
        return self.num_attempts / len(self.outcomes)


def run(size: Size) -> RowResult:
    """Send five times the peak with clients that retry."""
    result = RowResult("R4", "retry storm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = overloadable(folder)
        with running(server), quiet_collector():
            before, waiting = holdings(server), requests(SAMPLING)
            peak_rps = asyncio.run(_peak(server.address, waiting, folder, PEAK_S[size]))
            rate_rps = OVERLOAD * peak_rps
            num_before = server.count_calls(rpc="Generate")
            storming = islice(waiting, NUM_CALLS[size])
            outcomes = asyncio.run(_storm(server.address, storming, folder, rate_rps))
            storm = Storm(outcomes, server.count_calls(rpc="Generate") - num_before)
            names = ("storm", "reference")
            result.add(check(*(read_journal([folder / f"{name}.jsonl"]) for name in names)))
            result.leaks = leaks(server, before)
    result.measured["offered_rps"] = rate_rps
    judge(result, storm)
    return result


async def _peak(target: str, waiting: Requests, folder: Path, duration_s: float) -> float:
    with Journal(folder / "reference.jsonl") as journal:
        async with AsyncClient(target, max_attempts=1, timeout_s=60) as client:
            first = islice(waiting, NUM_TEMPLATES)
            await call_in_turns(client, first, journal, num_clients=MAX_NUM_SEQS)
            return await measure_peak(client, waiting, journal, duration_s)


async def _storm(target: str, waiting: Requests, folder: Path, rate_rps: float) -> list[Outcome]:
    with Journal(folder / "storm.jsonl") as journal:
        async with AsyncClient(target, timeout_s=60) as client:
            return await call_on_time(client, waiting, journal, rate_rps=rate_rps)


def judge(result: RowResult, storm: Storm) -> None:
    """Hold a storm against the target."""
    ended = codes(storm.outcomes)
    result.measured |= {
        "amplification": storm.amplification,
        "num_retries": storm.num_attempts - len(storm.outcomes),
        "max_attempts": MAX_ATTEMPTS,
        "codes": ended,
    }
    others = ended.keys() - {"OK", "RESOURCE_EXHAUSTED"}
    result.demand(not others, f"calls ended with {sorted(others)}")
    num_refused = ended.get("RESOURCE_EXHAUSTED", 0)
    result.demand(num_refused > len(storm.outcomes) / 2, f"only {num_refused} calls were refused")
    result.demand(
        storm.num_attempts > len(storm.outcomes), "nobody retried: this was no retry storm"
    )
    result.demand(
        storm.amplification <= MAX_AMPLIFICATION, f"{storm.amplification:.2f} attempts for a call"
    )
