"""Sends the requests of a schedule on time, from one event loop, and records what comes back.

Open loop: each request has its own task and is sent at its intended time, whatever became of those
before it, so that a server that stalls is not asked less often meanwhile (coordinated omission).
Closed loop: a number of workers, each with one request at a time.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtest.records import PlannedRequest, RequestRecord
from loadtest.schedule import Block
from loadtest.targets import RequestFailedError, Target


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What a block took from a client process.

    `cpu_share` is of one core, all of the process's threads together. `has_run_out`: a closed loop
    had no requests left at the block's end, so it may have been without load before.
    """

    process: int
    block: int
    cpu_share: float
    has_run_out: bool = False


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose timers are exact to some 0.1 ms: epoll's come up to 1 ms late."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Runner:
    """Runs blocks against a target; `records` and `costs` grow while it does.

    `start_s` is the run's start on the running loop's clock: that is `time.monotonic`, which all
    processes of a machine share. `cpu_time_s` is what this process has used so far.
    """

    def __init__(
        self,
        target: Target,
        start_s: float,
        process: int = 0,
        cpu_time_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._target = target
        self._clock_s = asyncio.get_running_loop().time
        self._cpu_time_s = cpu_time_s
        self._start_s = start_s
        self._process = process
        self.records: list[RequestRecord] = []
        self.costs: list[BlockCost] = []
        self.num_ended = 0
        self.num_failed = 0

    async def run(self, blocks: Sequence[Block]) -> None:
        """Run all blocks, and wait for the requests that are still on their way.

        Cancelled, it cancels them: they are recorded as CANCELLED.
        """
        async with asyncio.TaskGroup() as requests:
            for block in blocks:
                _collect_garbage()
                await self._sleep_until(block.start_s)
                await self._run_block(block, requests)

    async def _run_block(self, block: Block, requests: asyncio.TaskGroup) -> None:
        """Send a block's requests. Those that run at its end go on behind it."""
        started_s, started_cpu_s = self._now(), self._cpu_time_s()
        waiting = iter(block.requests)
        is_closed = bool(block.requests) and block.requests[0].intended_s is None
        if is_closed:
            for _ in range(round(block.load)):
                requests.create_task(self._work(waiting, block.end_s))
        else:
            await self._dispatch(waiting, requests)
        await self._sleep_until(block.end_s)
        cpu_share = (self._cpu_time_s() - started_cpu_s) / (self._now() - started_s)
        has_run_out = is_closed and next(waiting, None) is None
        self.costs.append(BlockCost(self._process, block.index, cpu_share, has_run_out))

    async def _dispatch(self, plans: Iterator[PlannedRequest], requests: asyncio.TaskGroup) -> None:
        for plan in plans:
            assert plan.intended_s is not None
            await self._sleep_until(plan.intended_s)
            requests.create_task(self._send(plan))

    async def _work(self, plans: Iterator[PlannedRequest], end_s: float) -> None:
        while self._now() < end_s:
            plan = next(plans, None)
            if plan is None:
                return
            await self._send(plan)

    async def _send(self, plan: PlannedRequest) -> None:
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
            self.num_ended += 1
            self.num_failed += record.status != "OK"

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
