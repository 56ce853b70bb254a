"""Mixed clients, some of which crash, for half an hour: memory stays where it is.

One client calls all the time; others are processes that are killed with SIGKILL in the middle of
their calls. Both stream, compare, score, cancel, come with deadlines too short and with mistakes.
Of the server's resident memory in the second half the greatest is at most 5 % or 32 MB, whichever
is more, above the mean. Afterwards nothing is held: no slot, no task, no thread. The size of the
tests is too short for that bound to say much: there it is 3 MB.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import check
from tests.faults.caller import Caller
from tests.faults.calls import quiet_collector
from tests.faults.result import RowResult, Size
from tests.faults.served import ServedProcess, holdings, leaks, resident_bytes
from tests.support.processes import running

PROGRAM = "tests.faults.served"
# The answers that are kept reach their bound in the first half, also of a short soak.
FLAGS = ("--max-num-seqs", "8", "--max-replays", "128", "--teacher-weight", "1",
         "--shadow-rate", "0.5")  # fmt: skip
MIN_LIFE = 0.4  # of a cycle, before a client is killed


@dataclass(frozen=True, slots=True)
class Plan:
    """Cycles, in each of which so many clients are killed; memory is looked at every `period_s`.

    The bound on memory is the greater of both.
    """

    num_cycles: int
    cycle_s: float
    num_crashing: int
    period_s: float
    max_growth_bytes: int
    max_growth_ratio: float


PLANS = {
    Size.CI: Plan(5, 3.0, 2, 0.1, 3 * 10**6, 0.0),
    Size.FULL: Plan(120, 15.0, 3, 0.5, 32 * 10**6, 0.05),
}


@dataclass(slots=True)
class Soak:
    """What was seen: memory by time, and how the calls of the client that stayed ended."""

    resident_bytes: list[int] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    num_crashes: int = 0
    num_own_ends: int = 0

    @property
    def second_half(self) -> Sequence[int]:
        return self.resident_bytes[len(self.resident_bytes) // 2 :]

    @property
    def growth_bytes(self) -> float:
        return max(self.second_half) - self.mean_bytes

    @property
    def mean_bytes(self) -> float:
        return sum(self.second_half) / len(self.second_half)


def run(size: Size) -> RowResult:
    """Soak a server."""
    result, plan, soak = RowResult("R22", "soak with crashing clients"), PLANS[size], Soak()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = ServedProcess("server", folder, *FLAGS, program=PROGRAM)
        with running(server), quiet_collector():
            reference = folder / "reference.jsonl"
            asyncio.run(_refer(server.address, reference))
            before = holdings(server)
            for number in range(plan.num_cycles):
                paths = asyncio.run(_cycle(server, number, folder, plan, soak))
                _add(result, paths, reference)
            result.leaks = leaks(server, before)
    judge(result, plan, soak)
    return result


async def _refer(target: str, path: Path) -> None:
    with Journal(path) as journal:
        await Caller(target, journal, "reference").run_once()


async def _cycle(
    server: ServedProcess, number: int, folder: Path, plan: Plan, soak: Soak
) -> list[Path]:
    """Have clients come and crash beside one that stays; return the journals, that one's first."""
    until_s = time.monotonic() + plan.cycle_s
    names = [f"crashing-{number}-{client}" for client in range(plan.num_crashing)]
    paths = [folder / f"{name}.jsonl" for name in ("steady", *names)]
    with Journal(paths[0]) as journal:
        steady = Caller(server.address, journal, f"steady-{number}")
        async with asyncio.TaskGroup() as group:
            group.create_task(steady.run(lambda: time.monotonic() < until_s))
            group.create_task(_watch_memory(server, until_s, plan.period_s, soak))
            for name, path in zip(names, paths[1:], strict=True):
                life_s = plan.cycle_s * random.Random(name).uniform(MIN_LIFE, 1)
                group.create_task(_crash(server.address, name, path, life_s, soak))
    soak.codes += steady.codes
    return paths


async def _watch_memory(server: ServedProcess, until_s: float, period_s: float, soak: Soak) -> None:
    while time.monotonic() < until_s:
        soak.resident_bytes.append(resident_bytes(server.pid))
        await asyncio.sleep(period_s)


async def _crash(target: str, name: str, journal: Path, life_s: float, soak: Soak) -> None:
    """Have a client process call for some time, and kill it."""
    command = [sys.executable, "-m", "tests.faults.caller", target, str(journal), name]
    process = subprocess.Popen(command)
    try:
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, life_s)
            soak.num_own_ends += 1
    finally:
        process.kill()
        process.wait()
    soak.num_crashes += 1


def _add(result: RowResult, paths: list[Path], reference: Path) -> None:
    """Count a cycle's journals, and forget them: those of half an hour fill a memory."""
    steady, *crashed = paths
    result.add(check(read_journal([steady]), read_journal([reference])))
    journals = [path for path in crashed if path.exists()]
    result.add(check(read_journal(journals), read_journal([reference]), may_be_open=True))
    for path in [steady, *journals]:
        path.unlink()


def judge(result: RowResult, plan: Plan, soak: Soak) -> None:
    """Hold the memory of the second half against the bound."""
    bound_bytes = max(plan.max_growth_bytes, plan.max_growth_ratio * soak.mean_bytes)
    result.measured = {
        "seconds": plan.num_cycles * plan.cycle_s,
        "num_crashes": soak.num_crashes,
        "resident_mean_bytes": soak.mean_bytes,
        "resident_growth_bytes": soak.growth_bytes,
        "growth_bound_bytes": bound_bytes,
        "resident_bytes_first_to_last": [soak.resident_bytes[0], soak.resident_bytes[-1]],
        "codes_of_steady_client": dict(soak.codes),
    }
    result.demand(
        soak.growth_bytes <= bound_bytes,
        f"memory grew {soak.growth_bytes / 1e6:.1f} MB above its mean of the second half",
    )
    result.demand(not soak.num_own_ends, f"{soak.num_own_ends} clients ended before their crash")
    wanted = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"}
    result.demand(
        wanted == soak.codes.keys(), f"calls ended with {sorted(soak.codes)}, not {sorted(wanted)}"
    )
