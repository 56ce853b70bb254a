"""Five times the load that a server can do: it refuses the rest at once, and does not do less.

An open loop sends on time whatever happens. Refusals carry RetryInfo, p99 <= 50 ms; goodput is at
least 0.9 of the peak, which is what as many callers get as run and wait; the p99 of what is
admitted is at most three times that of a lone caller. For that the queue is half of what runs:
who queues more has chosen to wait. Lone caller, peak and overload are measured in turns on one
server, in a process of its own, and judged by the median round. Latencies count from when a call
was due, so that a late client counts against the server.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from tests.faults.calls import Outcome, call_in_turns, call_on_time, codes, p99, quiet_collector
from tests.faults.result import RowResult, Size
from tests.faults.rig import requests_of
from tests.faults.served import ServedProcess, holdings, leaks
from tests.support.processes import running

OVERLOAD = 5.0
MAX_REFUSAL_P99_S = 0.050
MIN_GOODPUT = 0.9
MAX_LATENCY_RATIO = 3.0

PROGRAM = "tests.faults.served"
MAX_NUM_SEQS, MAX_WAITING = 8, 4
PASS_S = 0.005  # most of what a step takes, so that the machine's speed says little
NUM_TEMPLATES = 50
SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=24, temperature=1, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often to measure, and for how long each time."""

    num_rounds: int
    lone_s: float
    peak_s: float
    overload_s: float


PLANS = {Size.CI: Plan(3, 0.25, 0.7, 1.0), Size.FULL: Plan(24, 2.0, 2.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Round:
    """What a lone caller saw, how many calls a second were the peak, and what came of overload.

    `client_cpu_share` is of one core.
    """

    lone: list[Outcome]
    peak_rps: float
    outcomes: list[Outcome]
    client_cpu_share: float

    @property
    def admitted_s(self) -> list[float]:
        return [outcome.latency_s for outcome in self.outcomes if outcome.is_ok]

    @property
    def refused(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.code == "RESOURCE_EXHAUSTED"]

    @property
    def overload(self) -> float:
        """How many times the peak was really sent."""
        assert self.outcomes, "no call was sent: this machine is too busy to measure anything"
        first_s, last_s = self.outcomes[0].due_s, max(o.sent_s for o in self.outcomes)
        return len(self.outcomes) / (last_s - first_s) / self.peak_rps


@dataclass(frozen=True, slots=True)
class Measures:
    """A round in numbers."""

    overload: float
    goodput_over_peak: float
    lone_p99_s: float
    admitted_p99_s: float
    refusal_p99_s: float
    latency_ratio: float
    client_lag_p99_s: float
    client_cpu_share: float

    @classmethod
    def of(cls, seen: Round) -> Measures:
        lone_p99_s = p99([outcome.latency_s for outcome in seen.lone])
        return cls(
            overload=seen.overload,
            goodput_over_peak=_rate(seen.outcomes) / seen.peak_rps,
            lone_p99_s=lone_p99_s,
            admitted_p99_s=p99(seen.admitted_s),
            refusal_p99_s=p99([outcome.latency_s for outcome in seen.refused]),
            latency_ratio=p99(seen.admitted_s) / lone_p99_s,
            client_lag_p99_s=p99([o.sent_s - o.due_s for o in seen.outcomes]),
            client_cpu_share=seen.client_cpu_share,
        )


def run(size: Size) -> RowResult:
    """Measure a lone caller, the peak, and five times the peak, in turns."""
    result = RowResult("R3", "5 times the load, open loop")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = overloadable(folder)
        with running(server), quiet_collector():
            before = holdings(server)
            rounds = asyncio.run(_measure(server.address, folder, PLANS[size]))
            load, reference = (read_journal([folder / f"{n}.jsonl"]) for n in ("load", "reference"))
            result.add(check(load, reference))
            result.leaks = leaks(server, before)
    judge(result, rounds)
    return result


def overloadable(folder: Path) -> ServedProcess:
    """Return a server with a short queue."""
    flags = ("--max-num-seqs", str(MAX_NUM_SEQS), "--max-waiting", str(MAX_WAITING))
    return ServedProcess("server", folder, *flags, program=PROGRAM, pass_s=PASS_S)


def requests(sampling: pb.SamplingParams = SAMPLING) -> Iterator[pb.GenerateRequest]:
    """Yield requests without end, of few kinds, each under an id of its own."""
    fields: dict[str, Any] = {
        "route": pb.ROUTE_STUDENT,
        "sampling": sampling,
        "output": pb.OutputOptions(stream=False),
    }
    return iter(requests_of(10**9, num_templates=NUM_TEMPLATES, seed=3, **fields))


async def _measure(target: str, folder: Path, plan: Plan) -> list[Round]:
    waiting = requests()
    with Journal(folder / "reference.jsonl") as reference, Journal(folder / "load.jsonl") as load:
        async with AsyncClient(target, max_attempts=1, timeout_s=60) as client:
            first = [next(waiting) for _ in range(NUM_TEMPLATES)]
            await call_in_turns(client, first, reference, num_clients=MAX_NUM_SEQS)
            rounds = []
            for _ in range(plan.num_rounds):
                lone = await _in_turns(client, waiting, reference, 1, plan.lone_s)
                peak_rps = await measure_peak(client, waiting, reference, plan.peak_s)
                rate_rps = OVERLOAD * peak_rps
                began_s, began_cpu_s = time.monotonic(), time.process_time()
                some = islice(waiting, round(rate_rps * plan.overload_s))
                outcomes = await call_on_time(client, some, load, rate_rps=rate_rps)
                cpu_s = time.process_time() - began_cpu_s
                cpu_share = cpu_s / (time.monotonic() - began_s)
                rounds.append(Round(lone, peak_rps, outcomes, cpu_share))
    return rounds


async def measure_peak(
    client: AsyncClient, waiting: Iterator[pb.GenerateRequest], journal: Journal, duration_s: float
) -> float:
    """Return how many calls a second end well when as many are there as run and wait."""
    num_clients = MAX_NUM_SEQS + MAX_WAITING
    return _rate(await _in_turns(client, waiting, journal, num_clients, duration_s))


async def _in_turns(
    client: AsyncClient,
    waiting: Iterator[pb.GenerateRequest],
    journal: Journal,
    num_clients: int,
    duration_s: float,
) -> list[Outcome]:
    until_s = time.monotonic() + duration_s
    return await call_in_turns(
        client, waiting, journal,
        num_clients=num_clients, goes_on=lambda: time.monotonic() < until_s,
    )  # fmt: skip


def _rate(outcomes: list[Outcome]) -> float:
    """Return the calls per second that ended well while more came, the first quarter left out."""
    begin_s, end_s = min(o.sent_s for o in outcomes), max(o.sent_s for o in outcomes)
    begin_s += (end_s - begin_s) / 4
    return sum(o.is_ok and begin_s < o.ended_s <= end_s for o in outcomes) / (end_s - begin_s)


def judge(result: RowResult, rounds: list[Round]) -> None:
    """Hold the median round against the targets, and every call against what it may say."""
    by_round = [asdict(Measures.of(one)) for one in rounds]
    middle = {name: float(np.median([one[name] for one in by_round])) for name in by_round[0]}
    outcomes = [outcome for one in rounds for outcome in one.outcomes]
    refused = [outcome for one in rounds for outcome in one.refused]
    num_bare = sum(outcome.retry_delay_s is None for outcome in refused)
    result.latency_ratio = middle["latency_ratio"]
    result.measured = middle | {
        "codes": codes(outcomes),
        "peak_rps": float(np.median([one.peak_rps for one in rounds])),
        "all_refusals_p99_s": p99([outcome.latency_s for outcome in refused]),
        "all_admitted_p99_s": p99([s for one in rounds for s in one.admitted_s]),
    }
    others = result.measured["codes"].keys() - {"OK", "RESOURCE_EXHAUSTED"}
    result.demand(not others, f"calls ended with {sorted(others)}")
    result.demand(len(refused) > len(outcomes) / 2, f"only {len(refused)} calls were refused")
    result.demand(not num_bare, f"{num_bare} refusals without RetryInfo")
    result.demand(
        middle["overload"] >= 0.95 * OVERLOAD,
        f"only {middle['overload']:.2f} times the peak sent",
        is_timed=True,
    )
    result.demand(
        middle["refusal_p99_s"] <= MAX_REFUSAL_P99_S,
        f"p99 of refusals is {1e3 * middle['refusal_p99_s']:.0f} ms",
        is_timed=True,
    )
    result.demand(
        middle["goodput_over_peak"] >= MIN_GOODPUT,
        f"goodput is {middle['goodput_over_peak']:.2f} of the peak",
        is_timed=True,
    )
    result.demand(
        middle["latency_ratio"] <= MAX_LATENCY_RATIO,
        f"p99 of what is admitted is {middle['latency_ratio']:.2f} times a lone caller's",
        is_timed=True,
    )
