"""SIGTERM under load: nothing that was admitted is lost within the grace, and the exit is clean.

`tandem serve` of a tiny model, 16 callers who repeat nothing, and SIGTERM in the middle. What was
sent before ends well and whole; later calls are served, or refused with UNAVAILABLE and nothing of
an answer. Every other server has a grace too short for its work: what is left then ends with
SHUTDOWN, told in the answer, behind a beginning of its tokens. The exit code is 0, within the
grace, the drain's delay and 5 s. Answers are those of a server that was not disturbed.
"""

from __future__ import annotations

import asyncio
import math
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loadtest.ledger.journal import OK, Journal, read_journal
from loadtest.ledger.ledger import WHOLE, check
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from tests.faults.calls import Outcome, call_in_turns, codes, quiet_collector
from tests.faults.result import RowResult, Size
from tests.faults.rig import requests_of
from tests.support.processes import TandemProcess, running
from tests.support.tiny_bundle import tiny_student

NUM_RUNS = {Size.CI: 2, Size.FULL: 50}
NUM_CLIENTS = 16
NUM_TEMPLATES = 16
MAX_WARM_S = 0.3
DRAIN_DELAY_S = 0.5  # longer than a call takes to be admitted
GOES_ON_S = 0.8  # behind the signal
LONG_GRACE_S, SHORT_GRACE_S = 20.0, 0.02
MAX_AFTER_GRACE_S = 5.0
SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=100, temperature=1, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Drain:
    """What one server did; `took_s` from the signal to the exit, `exit_code` None without one.

    `num_cut` samples ended early; `num_partial` calls failed with a part of their answer.
    """

    grace_s: float
    signalled_s: float
    took_s: float
    exit_code: int | None
    outcomes: list[Outcome]
    num_cut: int
    num_partial: int

    @property
    def running(self) -> list[Outcome]:
        """Calls that the server had at the signal."""
        return [o for o in self.outcomes if o.sent_s < self.signalled_s < o.ended_s]


def run(size: Size) -> RowResult:
    """Drain servers under load, one after the other."""
    result = RowResult("R13", "SIGTERM under load")
    with tempfile.TemporaryDirectory() as name, quiet_collector():
        drains = [_drain(number, Path(name), result) for number in range(NUM_RUNS[size])]
    judge(result, drains)
    return result


def new_server(number: int, folder: Path) -> TandemProcess:
    """Return a server with a long grace; every other one has a short one."""
    times = ("--drain-delay-s", str(DRAIN_DELAY_S), "--drain-grace-s", str(_grace_s(number)))
    return tiny_student(f"server-{number}", folder, *times)


def _grace_s(number: int) -> float:
    return SHORT_GRACE_S if number % 2 else LONG_GRACE_S


def _drain(number: int, folder: Path, result: RowResult) -> Drain:
    server = new_server(number, folder)
    reference, journal = folder / "reference.jsonl", folder / f"drain-{number}.jsonl"
    with running(server):
        if number == 0:
            asyncio.run(_refer(server.address, reference))
        signalled_s, outcomes = asyncio.run(_signal_under_load(server, number, journal))
        exit_code, ended_s = _wait_exit(server, signalled_s + _grace_s(number) + 30)
    events = list(read_journal([journal]))
    result.add(check(events, read_journal([reference])))
    failed = {event["id"] for event in events if event["event"] == "end" and event["code"] != OK}
    samples = [event for event in events if event["event"] == "sample"]
    return Drain(
        grace_s=_grace_s(number),
        signalled_s=signalled_s,
        took_s=ended_s - signalled_s,
        exit_code=exit_code,
        outcomes=outcomes,
        num_cut=sum(sample["finish_reason"] not in WHOLE for sample in samples),
        num_partial=len({e["id"] for e in events if e["event"] == "tokens"} & failed),
    )


def _requests(seed: int) -> Iterator[pb.GenerateRequest]:
    """Yield requests of the same kinds for every server, under other ids."""
    for request in requests_of(
        10**9, num_templates=NUM_TEMPLATES, route=pb.ROUTE_STUDENT, sampling=SAMPLING
    ):
        request.request_id = f"{seed}-{request.request_id}"
        yield request


async def _refer(target: str, path: Path) -> None:
    with Journal(path) as journal:
        async with AsyncClient(target, max_attempts=1, timeout_s=60) as client:
            first = islice(_requests(-1), NUM_TEMPLATES)
            await call_in_turns(client, first, journal, num_clients=NUM_CLIENTS)


async def _signal_under_load(
    server: TandemProcess, number: int, path: Path
) -> tuple[float, list[Outcome]]:
    """Return when the signal was sent, and what became of all calls around it."""
    until_s, outcomes = math.inf, list[Outcome]()
    with Journal(path) as journal:
        async with AsyncClient(server.address, max_attempts=1, timeout_s=60) as client:
            calls = asyncio.create_task(
                call_in_turns(
                    client, _requests(number), journal,
                    num_clients=NUM_CLIENTS, goes_on=lambda: time.monotonic() < until_s,
                    outcomes=outcomes,
                )
            )  # fmt: skip
            while len(outcomes) < NUM_CLIENTS:  # all connected, and at any place of their answers
                await asyncio.sleep(0.01)
            await asyncio.sleep(MAX_WARM_S * random.Random(number).random())
            signalled_s = time.monotonic()
            until_s = signalled_s + GOES_ON_S
            server.begin_drain()
            return signalled_s, await calls


def _wait_exit(server: TandemProcess, until_s: float) -> tuple[int | None, float]:
    """Return the exit code, None if there is none in time, and when that was."""
    try:
        exit_code: int | None = server.wait_exit(until_s - time.monotonic())
    except subprocess.TimeoutExpired:
        exit_code = None
    return exit_code, time.monotonic()


def judge(result: RowResult, drains: list[Drain]) -> None:
    """Hold every drain against the targets."""
    outcomes = [outcome for drain in drains for outcome in drain.outcomes]
    told = [o for o in outcomes if not o.is_ok and o.retry_delay_s is not None]
    result.measured = {
        "num_drains": len(drains),
        "num_running_at_signal": sum(len(drain.running) for drain in drains),
        "num_refused_with_retry_info": len(told),
        "num_cut_by_short_grace": sum(d.num_cut for d in drains if d.grace_s == SHORT_GRACE_S),
        "max_seconds_after_grace": max(d.took_s - DRAIN_DELAY_S - d.grace_s for d in drains),
        "codes": codes(outcomes),
    }
    for number, drain in enumerate(drains):
        _judge_one(result, f"drain {number}", drain)
    result.demand(bool(told), "no call came during a drain")
    result.demand(
        len(drains) == 1 or result.measured["num_cut_by_short_grace"] > 0,
        "the short grace was long enough for all",
    )


def _judge_one(result: RowResult, name: str, drain: Drain) -> None:
    lost = [o for o in drain.outcomes if o.sent_s < drain.signalled_s and not o.is_ok]
    others = codes(drain.outcomes).keys() - {OK, "UNAVAILABLE"}
    num_running, after_s = len(drain.running), drain.took_s - DRAIN_DELAY_S - drain.grace_s
    result.num_lost += len(lost)
    result.demand(not lost, f"{name}: {len(lost)} calls lost: {lost[:1]}")
    result.demand(not drain.num_partial, f"{name}: {drain.num_partial} answers broke off")
    # CANCELLED: a call that came just before the listener closed, on a machine too busy to hold it.
    is_late = others == {"CANCELLED"}
    result.demand(not others, f"{name}: calls ended with {sorted(others)}", is_timed=is_late)
    result.demand(num_running >= NUM_CLIENTS // 2, f"{name}: only {num_running} calls ran")
    result.demand(drain.exit_code == 0, f"{name}: exit code {drain.exit_code}")
    text = f"{name}: ended {after_s:.1f} s behind the grace"
    result.demand(after_s <= MAX_AFTER_GRACE_S, text, is_timed=True)
    if drain.grace_s == LONG_GRACE_S:
        result.demand(not drain.num_cut, f"{name}: {drain.num_cut} samples cut within the grace")
