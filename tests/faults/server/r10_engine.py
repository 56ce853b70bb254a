"""An engine fails, dies or hangs: readiness goes off within 1 s, restarts are bounded, the other
model serves on.

Under load, by the kind of fault:

    one step fails       what is in flight ends with an error, the engine goes on, readiness stays
    every step fails     after three in a row the engine ends
    the thread dies      the engine has ended
    a step hangs         the engine is ended beside its thread, `max_step_s` after the step's begin

Where an engine ended, readiness is off within 1 s, and every call of it ends. Calls of the other
model all succeed, meanwhile and afterwards, although the two share the cores, by turns. Nothing
that hung may change anything when it goes on. The 1 s is behind `max_step_s` for what hangs.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from grpc_health.v1 import health_pb2, health_pb2_grpc

from loadtest.ledger.journal import OK, read_journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client.channel import Endpoint
from serve.engine.engine import MAX_FAILED_STEPS, Engine
from serve.engine.sequence import FinishReason
from serve.engine.turns import StepArbiter
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Role
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.faults.server.faulty import (
    Break,
    FaultyBackend,
    fail,
    fail_once,
    hang,
    kill_thread,
    quiet_log,
)

NUM_REQUESTS = {Size.CI: 40, Size.FULL: 1000}  # for each fault and model
NUM_CLIENTS = 8  # a failed step ends the calls of all at once, and others have to follow
ROLES = {Size.CI: [Role.TEACHER], Size.FULL: list(Role)}
NUM_TEMPLATES = 24
FIRST_PASS = 10
MAX_STEP_S = 0.3
MAX_READY_S = 1.0
SETTLE_S = 5.0
_SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class Case:
    """A fault of an engine, after which it `ends` or goes on."""

    name: str
    fault: Break
    ends: bool
    grace_s: float = 0.0


CASES = (
    Case("fails once", fail_once, ends=False),
    Case("fails always", fail, ends=True),
    Case("thread dies", kill_thread, ends=True),
    Case("hangs", hang, ends=True, grace_s=MAX_STEP_S),
)


class SharedRig(Rig):
    """Both models on the same cores, by turns, as on a machine without a GPU."""

    def __init__(self, folder: Path) -> None:
        self._arbiter = StepArbiter()
        super().__init__(folder, max_replays=0, make_backend=FaultyBackend)

    def _engine(self, role: Role, metrics: ServerMetrics) -> Engine:
        backend = self.backends[role]
        return Engine(
            backend,
            eos_token_ids=frozenset({backend.EOS}),
            max_waiting=self._max_waiting,
            observer=metrics.observer(role),
            name=role.value,
            arbiter=self._arbiter,
            priority=0 if role is Role.STUDENT else 1,
            max_step_s=MAX_STEP_S,
        )


def run(size: Size) -> RowResult:
    """Break each model in each way, under load."""
    result = RowResult("R10", "engine fails, dies or hangs")
    with quiet_log(), patch.object(threading, "excepthook", lambda died: None):
        for case in CASES:
            for role in ROLES[size]:
                with tempfile.TemporaryDirectory() as folder, SharedRig(Path(folder)) as rig:
                    _break(result, rig, case, role, NUM_REQUESTS[size])
    return result


def _break(result: RowResult, rig: SharedRig, case: Case, role: Role, count: int) -> None:
    name, victim, other = f"{role.value} {case.name}", rig.backends[role], role.other
    assert isinstance(victim, FaultyBackend)
    requests = list(requests_of(count, num_templates=NUM_TEMPLATES))
    reference = rig.drive(islice(requests, NUM_TEMPLATES), "reference")
    try:
        health = rig.run(_drive_watched(rig, requests, victim, case))
        during = rig.folder / "broken.jsonl"
        result.add(rig.ledger(during, reference))
        after = rig.drive(_alone(requests, other), "after")
        result.add(rig.ledger(after, reference), is_under_fault=False)
        _judge_calls(result, name, [during, after], requests, other)
        _judge_readiness(result, name, case, victim, health)
        result.leaks += [f"{name}: {leak}" for leak in _leaks(rig, case)]
        _check_return(result, name, rig, role, case)
    finally:
        victim.arm(None)
        victim.may_go_on.set()


async def _drive_watched(
    rig: SharedRig, requests: list[pb.GenerateRequest], victim: FaultyBackend, case: Case
) -> list[tuple[float, bool]]:
    """Send the requests, with the fault among them; return when readiness changed, and to what."""
    seen: list[tuple[float, bool]] = []
    async with _watched(rig.server.address, seen):
        victim.arm(case.fault, FIRST_PASS)
        await rig.send_all(iter(requests), rig.folder / "broken.jsonl", NUM_CLIENTS, _send)
        await asyncio.sleep(0.6)  # two looks of the server's
    return seen


async def _send(client: Any, request: pb.GenerateRequest, journal: Any) -> None:
    journal.sent(request)
    await journal.follow(request, client.generate(request))


@asynccontextmanager
async def _watched(address: str, seen: list[tuple[float, bool]]) -> AsyncIterator[None]:
    """Note each change of `readiness` during the block, as a client sees it."""
    is_told = asyncio.Event()

    async def watch() -> None:
        async with Endpoint(address).open_async() as channel:
            request = health_pb2.HealthCheckRequest(service="readiness")
            async for reply in health_pb2_grpc.HealthStub(channel).Watch(request):
                seen.append((time.monotonic(), reply.status == _SERVING))
                is_told.set()

    task = asyncio.create_task(watch())
    try:
        await asyncio.wait_for(is_told.wait(), 10)
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _alone(requests: list[pb.GenerateRequest], role: Role) -> list[pb.GenerateRequest]:
    """Return the requests of one model, under ids of their own."""
    return [
        pb.GenerateRequest.FromString(request.SerializeToString())
        for request in requests
        if request.route == _route(role)
    ]


def _route(role: Role) -> pb.Route:
    return pb.ROUTE_STUDENT if role is Role.STUDENT else pb.ROUTE_TEACHER


def _judge_calls(
    result: RowResult,
    name: str,
    journals: list[Path],
    requests: list[pb.GenerateRequest],
    other: Role,
) -> None:
    """The other model's calls succeed; the broken one's may fail, by an expected status."""
    of_other = {request.request_id for request in _alone(requests, other)}
    ends = [e for e in read_journal(journals) if e["event"] == "end"]
    codes = Counter(e["code"] for e in ends if e["id"] in of_other)
    broken = Counter(e["code"] for e in ends if e["id"] not in of_other)
    result.measured[f"codes, {name}"] = dict(broken)
    bad = {code: count for code, count in codes.items() if code != OK}
    result.demand(not bad, f"{name}: calls of the other model ended with {bad}")
    result.demand(codes[OK] > 0, f"{name}: the other model had no calls")
    odd = set(broken) - {OK, "INTERNAL", "UNAVAILABLE"}
    result.demand(not odd, f"{name}: calls ended with {sorted(odd)}")


def _judge_readiness(
    result: RowResult,
    name: str,
    case: Case,
    victim: FaultyBackend,
    health: list[tuple[float, bool]],
) -> None:
    result.demand(len(victim.broke_s) > 0, f"{name}: the fault did not happen")
    result.demand(
        len(victim.broke_s) <= MAX_FAILED_STEPS, f"{name}: {len(victim.broke_s)} steps failed"
    )
    off_s = [at_s for at_s, is_serving in health if not is_serving]
    if not case.ends:
        result.demand(not off_s, f"{name}: readiness went off")
        return
    if not off_s or not victim.broke_s:
        result.demand(False, f"{name}: readiness stayed on")
        return
    late_s = off_s[0] - victim.broke_s[-1] - case.grace_s
    result.measured[f"readiness_off_s, {name}"] = round(late_s, 3)
    text = f"{name}: readiness went off {late_s:.2f} s late"
    result.demand(late_s <= MAX_READY_S, text, is_timed=True)
    result.demand(not health[-1][1], f"{name}: readiness came back")


def _leaks(rig: SharedRig, case: Case) -> list[str]:
    """Return what leaks; where an engine ended, without the requests of `Rig.leaks`."""
    if not case.ends:
        return rig.leaks()
    until_s = time.monotonic() + SETTLE_S
    while (found := rig.run(rig.found_leaks())) and time.monotonic() < until_s:
        time.sleep(0.02)
    return found


def _check_return(result: RowResult, name: str, rig: SharedRig, role: Role, case: Case) -> None:
    """What hung goes on: its thread ends, and has nothing to say to anybody."""
    engine, victim = rig.engines.get(role).engine, rig.backends[role]
    if case.fault is not hang:
        return
    assert isinstance(engine, Engine) and isinstance(victim, FaultyBackend)
    before = _num_ended(rig, role)
    victim.may_go_on.set()
    engine._thread.join(10)
    result.demand(not engine._thread.is_alive(), f"{name}: the thread goes on")
    result.demand(_num_ended(rig, role) == before, f"{name}: samples ended twice")
    result.leaks += [f"{name}, gone on: {leak}" for leak in rig.run(rig.found_leaks())]


def _num_ended(rig: SharedRig, role: Role) -> float:
    return sum(
        rig.value("samples_total", role=role.value, finish_reason=reason.value)
        for reason in FinishReason
    )
