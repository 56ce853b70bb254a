"""Sends the requests of a schedule on time, from one event loop, and records what comes back.

Open loop: each request has its own task and is sent at its intended time, whatever became of those
before it, so that a server that stalls is not asked less often meanwhile (coordinated omission).
Closed loop: a number of workers, each with one request at a time. A worker whose request failed
waits before its next one, so that a server that is down is not asked thousands of times in vain.
"""

from __future__ import annotations

import asyncio
import gc
import random
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loadtest.client.targets import LoadTarget, RequestFailedError
from loadtest.records import PlannedRequest, RequestRecord
from loadtest.workload.schedule import Block


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What a block took from a client process.

    `cpu_share` is of one core, all of the process's threads together. `has_run_out`: a closed loop
    had no requests left at the block's end, so it may have been without load before. `paused_s`:
    how long its workers waited behind failures, all together.
    """

    process: int
    block: int
    cpu_share: float
    has_run_out: bool = False
    paused_s: float = 0.0


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose timers are exact to some 0.1 ms: epoll's come up to 1 ms late."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
JITTER = 0.5


class Pauses:
    """How long a worker of a closed loop waits behind one failure after the other.

    The first one is 0.1 s, each other one twice as long, up to 2 s, all of them ± 50 % by chance.
    `until_s` is when the last one ends, which may be in a later block.
    """

    def __init__(self, seed: str) -> None:
        self.until_s = 0.0
        self._random = random.Random(seed)
        self._pause_s = FIRST_PAUSE_S

    def succeeded(self) -> None:
        self._pause_s = FIRST_PAUSE_S

    def failed(self, sent_s: float) -> None:
        """Pause from when the request was sent that failed."""
        self.until_s = sent_s + self._pause_s * self._random.uniform(1 - JITTER, 1 + JITTER)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)


class LoadRunner:
    """Runs blocks against a target; `records` and `costs` grow while it does.

    `start_s` is the run's start on the running loop's clock: that is `time.monotonic`, which all
    processes of a machine share. `keep` is told what has ended, behind each block and at the end.
    `cpu_time_s` is what this process has used so far.
    """

    def __init__(
        self,
        target: LoadTarget,
        start_s: float,
        process: int = 0,
        keep: Callable[[Sequence[RequestRecord]], None] = lambda records: None,
        cpu_time_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._target = target
        self._clock_s = asyncio.get_running_loop().time
        self._cpu_time_s = cpu_time_s
        self._start_s = start_s
        self._process = process
        self._keep = keep
        self._ended: list[RequestRecord] = []
        self._pauses: dict[tuple[str, int], Pauses] = {}
        self._paused_s = 0.0
        self.records: list[RequestRecord] = []
        self.costs: list[BlockCost] = []
        self.num_ended = 0
        self.num_failed = 0

    async def run(self, blocks: Sequence[Block]) -> None:
        """Run all blocks, and wait for the requests that are still on their way.

        Cancelled, it cancels them: they are recorded as CANCELLED.
        """
        try:
            async with asyncio.TaskGroup() as requests:
                for block in blocks:
                    self._keep_ended()
                    _collect_garbage()
                    await self._sleep_until(block.start_s)
                    await self._run_block(block, requests)
        finally:
            self._keep_ended()

    def _keep_ended(self) -> None:
        ended, self._ended = self._ended, []
        self._keep(ended)

    async def _run_block(self, block: Block, requests: asyncio.TaskGroup) -> None:
        """Send a block's requests. Those that run at its end go on behind it."""
        started_s, started_cpu_s = self._now(), self._cpu_time_s()
        paused_s = self._paused_s
        waiting = iter(block.requests)
        is_closed = bool(block.requests) and block.requests[0].intended_s is None
        if is_closed:
            for worker in range(round(block.load)):
                pauses = self._pauses.setdefault(
                    (block.arm, worker), Pauses(f"{block.requests[0].seed} {worker}")
                )
                requests.create_task(self._work(waiting, block.end_s, pauses))
        else:
            await self._dispatch(waiting, requests)
        await self._sleep_until(block.end_s)
        cpu_share = (self._cpu_time_s() - started_cpu_s) / (self._now() - started_s)
        has_run_out = is_closed and next(waiting, None) is None
        paused_s = self._paused_s - paused_s
        self.costs.append(BlockCost(self._process, block.index, cpu_share, has_run_out, paused_s))

    async def _dispatch(self, plans: Iterator[PlannedRequest], requests: asyncio.TaskGroup) -> None:
        for plan in plans:
            assert plan.intended_s is not None
            await self._sleep_until(plan.intended_s)
            requests.create_task(self._send(plan))

    async def _work(self, plans: Iterator[PlannedRequest], end_s: float, pauses: Pauses) -> None:
        await self._pause(pauses.until_s, end_s)
        while self._now() < end_s:
            plan = next(plans, None)
            if plan is None:
                return
            record = await self._send(plan)
            if record.is_ok:
                pauses.succeeded()
            else:
                pauses.failed(record.sent_s)
                await self._pause(pauses.until_s, end_s)

    async def _pause(self, until_s: float, end_s: float) -> None:
        """Send nothing until then, and then until there is a connection, up to 2 s; or the end."""
        began_s = self._now()
        if until_s <= began_s:
            return
        await self._sleep_until(min(until_s, end_s))
        with suppress(TimeoutError):
            async with asyncio.timeout(min(MAX_PAUSE_S, max(end_s - self._now(), 0.0))):
                await self._target.wait_connected()
        self._paused_s += self._now() - began_s

    async def _send(self, plan: PlannedRequest) -> RequestRecord:
        record = RequestRecord(plan, sent_s=self._now())
        self.records.append(record)
        try:
            await self._target.send(record, self._now)
            record.status = "OK"
        except RequestFailedError as failed:
            record.status, record.error = failed.status, failed.text
        except asyncio.CancelledError:
            record.status = "CANCELLED"
            raise
        finally:
            record.ended_s = self._now()
            self._ended.append(record)
            self.num_ended += 1
            self.num_failed += not record.is_ok
        return record

    @property
    def elapsed_s(self) -> float:
        return self._now()

    def _now(self) -> float:
        return self._clock_s() - self._start_s

    async def _sleep_until(self, moment_s: float) -> None:
        delay_s = moment_s - self._now()
        if delay_s > 0:
            await asyncio.sleep(delay_s)


def _collect_garbage() -> None:
    """Collect while no load is on, and look no more at what is left: records only grow.

    What comes during a block is then collected within 0.5 ms at a time, so that may stay on.
    """
    gc.collect()
    gc.freeze()
