from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loadtest.client.runner import LoadRunner, Pauses, new_event_loop
from loadtest.client.targets import Clock, RequestFailedError, TandemTarget
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase, RequestRecord
from loadtest.workload.schedule import Block
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc
from tests.support.load_tests import planned
from tests.support.rpc.listening import listening

Answer = Callable[[RequestRecord], Awaitable[None]]


class ClockLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while there is anything to do, and then goes to the next timer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_ClockSelector(self))

    def time(self) -> float:
        return self.now_s


class _ClockSelector(selectors.SelectSelector):
    def __init__(self, loop: ClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(None if timeout is None else 0)
        self._loop.now_s += 0 if ready or timeout is None else timeout
        return ready


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        yield runner.run


def pass_time(seconds: float) -> None:
    """Keep the whole loop busy for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    loop.now_s += seconds


class FakeTarget:
    """Answers as a test says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def send(self, record: RequestRecord, clock: Clock) -> None:
        await self._answer(record)

    async def check(self) -> None: ...

    async def wait_connected(self) -> None: ...

    async def close(self) -> None: ...


def block(
    intended_s: Sequence[float | None], *, start_s: float = 0.0, end_s: float = 0.3, load: float = 1
) -> Block:
    requests = tuple(planned(n, intended_s=moment_s) for n, moment_s in enumerate(intended_s))
    return Block(0, load, "student", start_s, end_s, Phase.MEASURED, requests)


async def load(answer: Answer, *blocks: Block) -> LoadRunner:
    runner = LoadRunner(FakeTarget(answer), asyncio.get_running_loop().time() + 0.05)
    await runner.run(blocks)
    return runner


async def at_once(record: RequestRecord) -> None: ...


# Open loop


def test_stall_is_in_the_latency_of_every_request_due_meanwhile(run: Any) -> None:
    """A request every 50 ms; from 0.5 to 1.5 s nobody is answered."""

    async def stall(record: RequestRecord) -> None:
        if 0.5 <= record.sent_s < 1.5:
            await asyncio.sleep(1.5 - record.sent_s)

    records = run(load(stall, block([0.05 * number for number in range(40)], end_s=2.0))).records
    for number, record in enumerate(records):
        due_s = 0.05 * number
        assert record.send_lag_s == pytest.approx(0)
        assert record.e2e_s == pytest.approx(1.5 - due_s if 0.5 <= due_s < 1.5 else 0)
    assert len(records) == 40


class Stalling(inference_pb2_grpc.InferenceServiceServicer):
    """Answers nobody until `num_asked` requests are there."""

    def __init__(self, num_asked: int) -> None:
        self._all_are_here = threading.Barrier(num_asked, action=self._end)
        self.ended_s = 0.0

    def _end(self) -> None:
        self.ended_s = time.monotonic()

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self._all_are_here.wait(60)
        yield pb.GenerateResponse(tokens=pb.TokenChunk(token_ids=[5]))
        yield pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(token_ids=[5])))
        yield pb.GenerateResponse(usage=pb.Usage())


async def send(target: str, start_s: float, requests: Block) -> list[RequestRecord]:
    tandem = TandemTarget(
        RunConfig(target=target, out=Path("unused")), {"p": DatasetPrompt("p", "?")}
    )
    runner = LoadRunner(tandem, start_s)
    await runner.run([requests])
    await tandem.close()
    return runner.records


def test_server_that_answers_nobody_is_asked_none_the_less() -> None:
    service = Stalling(20)
    requests = block([0.01 * number for number in range(20)])
    with listening(service, num_threads=20) as target:
        start_s = time.monotonic()
        with asyncio.Runner(loop_factory=new_event_loop) as real:
            records = real.run(send(target, start_s, requests))
    assert [record.status for record in records] == ["OK"] * 20
    for record in records:
        assert record.ttft_s is not None and record.plan.intended_s is not None
        assert record.send_lag_s is not None and record.send_lag_s >= 0
        assert start_s + record.plan.intended_s + record.ttft_s >= service.ended_s


def test_slow_client_shows_as_send_lag(run: Any) -> None:
    async def blocked(record: RequestRecord) -> None:
        if record.plan.number == 0:
            pass_time(0.2)

    records = run(load(blocked, block([0.0, 0.05, 0.1, 0.28]))).records
    assert [record.send_lag_s for record in records] == pytest.approx([0, 0.15, 0.1, 0])


def test_timers_of_a_client_are_not_in_whole_milliseconds() -> None:
    # epoll's time-out is; `bench.loadtest_client` measures what comes of it.
    with asyncio.Runner(loop_factory=new_event_loop) as real:
        loop: Any = real.get_loop()
        assert type(loop._selector) is selectors.SelectSelector


def test_requests_go_on_behind_the_end_of_their_block(run: Any) -> None:
    async def slow(record: RequestRecord) -> None:
        await asyncio.sleep(0.3)

    second = block([0.2], start_s=0.2, end_s=0.25)
    runner = run(load(slow, block([0.0], end_s=0.1), second))
    assert [round(record.sent_s, 1) for record in runner.records] == [0.0, 0.2]
    assert [record.is_ok for record in runner.records] == [True, True]
    assert [record.e2e_s for record in runner.records] == pytest.approx([0.3, 0.3])


def test_cancelled_load_keeps_its_records(run: Any) -> None:
    async def endless(record: RequestRecord) -> None:
        await asyncio.sleep(60 * record.plan.number)

    async def cancel() -> LoadRunner:
        runner = LoadRunner(FakeTarget(endless), asyncio.get_running_loop().time())
        task = asyncio.create_task(runner.run([block([0.0, 0.05, 9.0], end_s=10)]))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return runner

    runner = run(cancel())
    assert [record.status for record in runner.records] == ["OK", "CANCELLED"]
    assert runner.records[1].ended_s > runner.records[1].sent_s


# Closed loop


def test_closed_loop_has_so_many_requests_at_a_time(run: Any) -> None:
    running: list[int] = []

    async def counted(record: RequestRecord) -> None:
        running.append(record.plan.number)
        assert len(running) <= 3
        await asyncio.sleep(0.02)
        running.remove(record.plan.number)

    runner = run(load(counted, block([None] * 1000, load=3)))
    # Three workers for 0.3 s at 0.02 s each; rounding decides on those at the very end.
    numbers = [record.plan.number for record in runner.records]
    assert numbers == list(range(len(numbers)))
    assert 45 <= len(numbers) <= 48
    assert all(record.sent_s < 0.3 and record.send_lag_s is None for record in runner.records)
    assert not runner.costs[0].has_run_out


def test_closed_loop_without_requests_left_says_so(run: Any) -> None:
    assert run(load(at_once, block([None] * 4, load=2))).costs[0].has_run_out


async def refuse(record: RequestRecord) -> None:
    raise RequestFailedError("UNAVAILABLE", "nobody is there")


def test_closed_loop_pauses_behind_failures(run: Any) -> None:
    """Without pauses 4 workers send all 2,000 requests in no time, and are then idle."""
    minute = block([None] * 2000, load=4, end_s=60.0)
    runner = run(load(refuse, minute))
    # The pauses: 0.1, 0.2, 0.4, 0.8, 1.6 and then 2 s, each half of it at the least.
    assert 4 * 60 / 3 < len(runner.records) < 4 * (5 + 60 / 1)
    (cost,) = runner.costs
    assert cost.paused_s > 200 and not cost.has_run_out
    again = [record.sent_s for record in run(load(refuse, minute)).records]
    assert again == pytest.approx([record.sent_s for record in runner.records])


def test_closed_loop_goes_on_when_the_server_is_back(run: Any) -> None:
    async def refuse_for_a_while(record: RequestRecord) -> None:
        if record.sent_s < 10:
            await refuse(record)
        await asyncio.sleep(0.1)

    records = run(load(refuse_for_a_while, block([None] * 900, load=1, end_s=30.0))).records
    assert sum(not record.is_ok for record in records) < 16
    assert sum(record.is_ok for record in records) > 170  # of 200, less a pause of 3 s


def test_open_loop_keeps_its_schedule_behind_failures(run: Any) -> None:
    due_s = [0.01 * number for number in range(200)]
    records = run(load(refuse, block(due_s, end_s=2.0))).records
    assert [record.sent_s for record in records] == pytest.approx(due_s)


def test_pauses_grow_up_to_a_bound_and_begin_anew() -> None:
    pauses = Pauses("0 0")
    for pause_s in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        pauses.failed(7.0)
        assert 0.5 * pause_s <= pauses.until_s - 7.0 <= 1.5 * pause_s
    pauses.succeeded()
    pauses.failed(7.0)
    assert pauses.until_s <= 7.15


def test_workers_do_not_pause_in_step() -> None:
    workers = [Pauses(f"0 {worker}") for worker in range(8)]
    for worker in workers:
        worker.failed(0.0)
    assert len({worker.until_s for worker in workers}) == 8


def test_pauses_go_on_through_the_blocks_of_an_arm(run: Any) -> None:
    blocks = [
        block([None] * 200, load=4, start_s=0.55 * number, end_s=0.55 * number + 0.5)
        for number in range(20)
    ]
    num_sent = len(run(load(refuse, *blocks)).records)
    assert num_sent < 4 * (6 + 11)  # one a second and worker, when it has failed for long


# What becomes of requests


def test_ended_requests_are_kept_behind_each_block(run: Any) -> None:
    kept: list[list[int]] = []

    async def slow(record: RequestRecord) -> None:
        await asyncio.sleep(0.25 if record.plan.number == 1 else 0.01)

    async def keep() -> None:
        runner = LoadRunner(
            FakeTarget(slow), asyncio.get_running_loop().time(),
            keep=lambda records: kept.append([record.plan.number for record in records]),
        )  # fmt: skip
        blocks = [block([0.0, 0.05], end_s=0.1), block([0.2], start_s=0.2, end_s=0.25)]
        await runner.run(blocks)

    run(keep())
    assert kept == [[], [0], [0, 1]]


def test_failure_is_its_status(run: Any) -> None:
    async def refuse(record: RequestRecord) -> None:
        if record.plan.number:
            raise RequestFailedError("RESOURCE_EXHAUSTED", "full")

    runner = run(load(refuse, block([0.0, 0.1])))
    assert [(r.status, r.error) for r in runner.records] == [
        ("OK", ""),
        ("RESOURCE_EXHAUSTED", "full"),
    ]
    assert (runner.num_ended, runner.num_failed) == (2, 1)


def test_fault_of_the_client_is_none_of_the_server(run: Any) -> None:
    async def broken(record: RequestRecord) -> None:
        raise KeyError(record.plan.prompt_id)

    with pytest.raises(ExceptionGroup) as caught:
        run(load(broken, block([0.0, 0.1])))
    assert caught.group_contains(KeyError)


def test_cost_is_the_share_of_a_core(run: Any) -> None:
    used_s = [0.0]

    async def busy(record: RequestRecord) -> None:
        used_s[0] += 0.1

    async def measure() -> LoadRunner:
        start_s = asyncio.get_running_loop().time()
        runner = LoadRunner(FakeTarget(busy), start_s, cpu_time_s=lambda: used_s[0])
        await runner.run([block([0.0], end_s=0.4), block([], start_s=0.5, end_s=0.6)])
        return runner

    assert [cost.cpu_share for cost in run(measure()).costs] == pytest.approx([0.25, 0])
