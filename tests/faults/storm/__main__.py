"""A chaos test: callers, operators and models that misbehave all at once, by chance.

    python -m tests.faults.storm --seed 1 --seconds 60

Each seed makes a server and a plan (`plan`). A calm run says what the answers are. Then
`backend` runs out of memory, fails and gives NaN, while callers share ids, leave, hurry and
stream (`callers`), an operator changes the policy and aborts, and the token file is written
again. In some plans the teacher is another server, which comes and goes (`remote_teacher`); in
some all connections are encrypted, and the certificates rotate (`certificates`). Every answer
is held against the calm run, and what may not leak must be back; the same requests afterwards must
be equal to the last bit. At the end it drains under load.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from tests.faults.answers import answers_of
from tests.faults.server.faulty import quiet_log
from tests.faults.storm.backend import CALM
from tests.faults.storm.callers import MAX_CALL_S, Callers, Scorers, Streamers, operate
from tests.faults.storm.plan import TENANTS, Plan, make_plan
from tests.faults.storm.rig import StormRig

_ROUTES = (pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH)
_MAX_SHOWN = 8


@dataclass(slots=True)
class Outcome:
    """What came of a storm."""

    seed: int
    num_requests: int = 0
    num_faults: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(self.codes.items()))
        shown = [f"  {problem}" for problem in self.problems[:_MAX_SHOWN]]
        verdict = f"{len(self.problems)} PROBLEMS" if self.problems else "ok"
        head = f"seed {self.seed}: {self.num_requests} requests, {self.num_faults} faults"
        return "\n".join([f"{head} ({codes}): {verdict}", *shown])


def run(
    seed: int, seconds: float = 1.0, prepare: Callable[[StormRig], None] = lambda rig: None
) -> Outcome:
    """Run one storm; `prepare` may break the server before it."""
    plan, outcome = make_plan(seed), Outcome(seed)
    with quiet_log(), tempfile.TemporaryDirectory() as name, StormRig(Path(name), plan) as rig:
        prepare(rig)
        _Storm(rig, plan, outcome).run(seconds)
    if rig.remote is not None:
        outcome.problems += rig.remote.problems
    return outcome


class _Storm:
    """One storm over one server."""

    def __init__(self, rig: StormRig, plan: Plan, outcome: Outcome) -> None:
        self._rig, self._plan, self._outcome = rig, plan, outcome
        self._scorers = Scorers(plan, rig.clients[TENANTS[0]])
        self._streamers = Streamers(rig.clients[TENANTS[1]], plan)
        self._acts = plan.acts()
        self._rng = random.Random(f"storm {plan.seed}")

    def run(self, seconds: float) -> None:
        rig, outcome = self._rig, self._outcome
        reference = self._drive_templates("reference")
        rig.run(self._learn())
        rig.set_weather(self._plan.weather)
        journal = rig.run(self._rage(seconds, "storm", has_operator=True))
        rig.set_weather(CALM)
        outcome.num_faults = rig.num_faults
        self._check(journal, reference)
        outcome.problems += rig.leaks()
        self._check_aftermath(reference)
        self._check(rig.run(self._rage(seconds / 4, "drain", ends=True)), reference)
        self._check_the_end()
        outcome.problems += self._scorers.problems + self._streamers.problems
        outcome.num_requests += self._scorers.num_requests + self._streamers.num_requests

    def _drive_templates(self, name: str) -> Path:
        """Have every template answered in calm weather by each route; ids are the same each time.

        So few at a time that the shortest queue has room.
        """
        path = self._rig.folder / f"{name}.jsonl"

        async def drive() -> None:
            requests = self._variants()
            with Journal(path) as journal:
                for noted in requests:
                    sent = pb.GenerateRequest()
                    sent.CopyFrom(noted)
                    sent.request_id = f"{name} {noted.request_id}"
                    journal.sent(noted)
                    await journal.follow(noted, _renamed(self._rig.client.generate(sent), noted))

        self._rig.run(drive())
        return path

    def _variants(self) -> Iterator[pb.GenerateRequest]:
        for number, template in enumerate(self._plan.templates):
            for route in _ROUTES:
                request = pb.GenerateRequest(request_id=f"{number} {route}")
                request.MergeFrom(template)
                request.route = route
                yield request
            # As a Compare is noted.
            request.request_id = f"{number} compare"
            request.output.CopyFrom(pb.OutputOptions(stream=False))
            yield request

    async def _learn(self) -> None:
        await self._scorers.learn()
        await self._streamers.stream(self._rng, is_calm=True)

    async def _rage(
        self, seconds: float, name: str, *, has_operator: bool = False, ends: bool = False
    ) -> Path:
        path = self._rig.folder / f"{name}.jsonl"
        with Journal(path) as journal:
            callers = Callers(self._plan, self._rig.clients, journal)
            callers.is_broken = self._plan.weather != CALM and not ends
            until_s = time.monotonic() + seconds
            calling = [
                asyncio.create_task(self._call_until(callers, until_s))
                for _ in range(self._plan.num_callers)
            ]
            others = [
                asyncio.create_task(self._stream_until(until_s)),
                asyncio.create_task(self._score_until(until_s)),
            ]
            if has_operator:
                others.append(asyncio.create_task(self._operate_until(until_s)))
            if has_operator and self._rig.certificates is not None:
                others.append(asyncio.create_task(self._renew_until(until_s)))
            async with self._teacher_that_comes_and_goes():
                if ends:
                    await asyncio.sleep(seconds / 2)
                    for one in (callers, self._scorers, self._streamers):
                        one.is_draining = True
                    await self._end_server()
                await self._wait_for(calling + others)
        self._outcome.codes += callers.codes
        self._outcome.num_requests += callers.num_requests
        self._outcome.problems += callers.problems
        return path

    @asynccontextmanager
    async def _teacher_that_comes_and_goes(self) -> AsyncIterator[None]:
        """Have the remote teacher, if there is one, be lost; in the end it must be there."""
        teacher = self._rig.remote
        if teacher is None:
            yield
            return
        # So short that a road which brings nothing is noticed within a storm.
        with patch("serve.pair.remote_teacher.PROBE_TIMEOUT_S", 0.2):
            is_over = asyncio.Event()
            task = asyncio.create_task(teacher.misbehave_until(is_over))
            try:
                yield
            finally:
                is_over.set()
                await task
        if self._rig.server._end is None:
            await teacher.be_found()

    async def _wait_for(self, tasks: list[asyncio.Task[None]]) -> None:
        _, pending = await asyncio.wait(tasks, timeout=3 * MAX_CALL_S)
        if pending:
            self._outcome.problems.append(f"{len(pending)} of {len(tasks)} callers hang")
        for task in pending:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self._outcome.problems.append(f"a caller failed: {result!r}")

    async def _call_until(self, callers: Callers, until_s: float) -> None:
        while time.monotonic() < until_s:
            await callers.call(next(self._acts))

    async def _stream_until(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self._streamers.stream(self._rng)
            await asyncio.sleep(0.01)

    async def _score_until(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            timeout_s = self._rng.choice([MAX_CALL_S, 0.01])
            await self._scorers.score(self._rng.randrange(6), timeout_s)
            await asyncio.sleep(0.01)

    async def _operate_until(self, until_s: float) -> None:
        rig = self._rig
        endpoint = rig.endpoint(TENANTS[0], rig.server.control_address)
        # Empty at first, as who writes in place leaves it: what was read before must hold.
        rig.tokens.write_text("", encoding="utf-8")
        with suppress(TimeoutError):
            async with asyncio.timeout(max(until_s - time.monotonic(), 0)):
                await operate(endpoint, self._rng)
        rig.tokens.write_text(f"# again\n{rig.token_lines}", encoding="utf-8")

    async def _renew_until(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self._rig.renew(self._rng)
            await asyncio.sleep(self._rng.uniform(0, 0.3))

    async def _end_server(self) -> None:
        """Ask for the end twice, and hurry it or not."""
        server = self._rig.server
        started_s = time.monotonic()
        stops = [asyncio.create_task(server.stop()) for _ in range(2)]
        await asyncio.sleep(self._rng.uniform(0, 0.05))
        if self._rng.random() < 0.5:
            server.hurry()
        await asyncio.gather(*stops)
        took_s = time.monotonic() - started_s
        if took_s > self._plan.settings["drain_grace_s"] + 10:
            self._outcome.problems.append(f"the drain took {took_s:.1f} s")

    def _check(self, journal: Path, reference: Path) -> None:
        ledger = self._rig.ledger(journal, reference)
        self._outcome.problems += [str(violation) for violation in ledger.violations]

    def _check_aftermath(self, reference: Path) -> None:
        expected = answers_of(reference)
        found = answers_of(self._drive_templates("aftermath"))
        different = [name for name in expected if found.get(name) != expected[name]]
        if different:
            text = f"{len(different)} answers afterwards differ: {different[:5]}"
            self._outcome.problems.append(text)

    def _check_the_end(self) -> None:
        """Nothing runs in a server that has ended."""
        server, problems = self._rig.server, self._outcome.problems
        counts = {
            "requests": server.coordinator.num_running,
            "shadows": server.coordinator.num_shadows,
            "calls": server.gate.num_active,
        }
        for model in self._rig.engines.loaded:
            load = model.engine.load()
            counts[f"{model.role.value}"] = (
                load.num_running + load.num_waiting + abs(load.num_unaccounted)
            )
        problems += [f"{name}: {n} behind the end" for name, n in counts.items() if n]


async def _renamed(
    events: AsyncIterable[pb.GenerateResponse], noted: pb.GenerateRequest
) -> AsyncIterator[pb.GenerateResponse]:
    """Yield events with the id under which the journal knows their call."""
    async for event in events:
        if event.HasField("usage"):
            event.usage.request_id = noted.request_id
        yield event


def main(arguments: list[str] | None = None) -> int:
    """Run storms of increasing seeds for some time; the exit code says whether all was well."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first storm")
    parser.add_argument("--seconds", type=float, default=1.0, help="in all; one storm at least")
    parser.add_argument("--length-s", type=float, default=2.0, help="of each storm")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    until_s, seed, num_bad = time.monotonic() + given.seconds, given.seed, 0
    while True:
        outcome = run(seed, given.length_s)
        print(outcome, flush=True)
        num_bad += bool(outcome.problems)
        seed += 1
        if time.monotonic() >= until_s:
            return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
