from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from loadtest.config import RunConfig
from loadtest.records import Phase, PlannedRequest, Prompt, RequestRecord
from loadtest.runner import Runner, new_event_loop
from loadtest.schedule import Block
from loadtest.targets import Clock, RequestFailedError, TandemTarget
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc

Answer = Callable[[RequestRecord], Awaitable[None]]


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """Keep the collector, which takes half a second for all that other tests hold, out of times."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        yield runner.run


class FakeTarget:
    """Answers as a test says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def send(self, record: RequestRecord, clock: Clock) -> None:
        await self._answer(record)

    async def check(self) -> None: ...

    async def close(self) -> None: ...


def block(
    intended_s: Sequence[float | None], *, start_s: float = 0.0, end_s: float = 0.3, load: float = 1
) -> Block:
    requests = tuple(
        PlannedRequest(number, "student", 1.0, 0, number, "p", 0, Phase.MEASURED, moment_s)
        for number, moment_s in enumerate(intended_s)
    )
    return Block(0, load, "student", start_s, end_s, Phase.MEASURED, requests)


async def load(answer: Answer, *blocks: Block) -> Runner:
    runner = Runner(FakeTarget(answer), time.monotonic() + 0.05)
    await runner.run(blocks)
    return runner


async def at_once(record: RequestRecord) -> None: ...


# Open loop


class Stalling(inference_pb2_grpc.InferenceServiceServicer):
    """Answers at once, but nobody while it stalls."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.may_answer.wait(10)
        yield pb.GenerateResponse(tokens=pb.TokenChunk(token_ids=[5]))
        yield pb.GenerateResponse(complete=pb.Complete(sample=pb.Sample(token_ids=[5])))
        yield pb.GenerateResponse(usage=pb.Usage())


async def stall(service: Stalling, target: str) -> list[RequestRecord]:
    """Send a request every 50 ms; from 0.5 to 1.5 s the server stalls."""
    config = RunConfig(target=target, out=Path("unused"))
    tandem = TandemTarget(config, {"p": Prompt("p", "?")})
    start_s = time.monotonic() + 0.1
    asyncio.get_running_loop().call_at(start_s + 0.5, service.may_answer.clear)
    asyncio.get_running_loop().call_at(start_s + 1.5, service.may_answer.set)
    runner = Runner(tandem, start_s)
    await runner.run([block([0.05 * number for number in range(40)], end_s=2.0)])
    await tandem.close()
    return runner.records


def test_stall_is_in_the_latency_of_every_request_due_meanwhile(run: Any) -> None:
    service = Stalling()
    server = grpc.server(ThreadPoolExecutor(40))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    records = run(stall(service, f"127.0.0.1:{port}"))
    server.stop(None).wait()
    assert [record.status for record in records] == ["OK"] * 40
    for record in records:
        due_s = record.plan.intended_s
        assert due_s is not None and record.ttft_s is not None
        assert record.send_lag_s is not None and 0 <= record.send_lag_s < 0.4
        if 0.55 <= due_s <= 1.45:
            assert 1.5 - due_s - 0.05 < record.ttft_s < 1.5 - due_s + 0.6
        elif not 0.45 < due_s < 1.55:
            assert record.e2e_s < 0.9  # through the stall it would take 1.05 at least


def test_slow_client_shows_as_send_lag(run: Any) -> None:
    async def blocked(record: RequestRecord) -> None:
        if record.plan.number == 0:
            time.sleep(0.2)  # the whole loop

    records = run(load(blocked, block([0.0, 0.05, 0.1, 0.28]))).records
    lags_s = [record.send_lag_s for record in records]
    assert lags_s[0] < 0.05 and lags_s[3] < 0.05
    assert lags_s[1] == pytest.approx(0.15, abs=0.05)
    assert lags_s[2] == pytest.approx(0.1, abs=0.05)


def test_timers_are_exact_to_a_fraction_of_a_millisecond(run: Any) -> None:
    async def overshoots_s() -> list[float]:
        found = []
        for _ in range(30):
            started_s = time.monotonic()
            await asyncio.sleep(0.0021)
            found.append(time.monotonic() - started_s - 0.0021)
        return sorted(found)

    # epoll's time-out, in whole milliseconds, is 0.9 ms too late at the least.
    assert 0 <= run(overshoots_s())[3] < 0.0008


def test_requests_go_on_behind_the_end_of_their_block(run: Any) -> None:
    async def slow(record: RequestRecord) -> None:
        await asyncio.sleep(0.3)

    second = block([0.2], start_s=0.2, end_s=0.25)
    runner = run(load(slow, block([0.0], end_s=0.1), second))
    assert [round(record.sent_s, 1) for record in runner.records] == [0.0, 0.2]
    assert [record.is_ok for record in runner.records] == [True, True]
    assert all(record.e2e_s >= 0.3 for record in runner.records)


def test_cancelled_load_keeps_its_records(run: Any) -> None:
    async def endless(record: RequestRecord) -> None:
        await asyncio.sleep(60 * record.plan.number)

    async def cancel() -> Runner:
        runner = Runner(FakeTarget(endless), time.monotonic())
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
    numbers = [record.plan.number for record in runner.records]
    assert numbers == list(range(len(numbers)))
    assert 12 <= len(numbers) <= 48
    assert all(record.sent_s < 0.3 and record.send_lag_s is None for record in runner.records)
    assert not runner.costs[0].has_run_out


def test_closed_loop_without_requests_left_says_so(run: Any) -> None:
    assert run(load(at_once, block([None] * 4, load=2))).costs[0].has_run_out


# What becomes of requests


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
    async def busy(record: RequestRecord) -> None:
        until_s = time.process_time() + 0.1
        while time.process_time() < until_s:
            pass

    costs = run(load(busy, block([0.0], end_s=0.4), block([], start_s=0.5, end_s=0.6))).costs
    assert 0.15 < costs[0].cpu_share < 0.5
    assert costs[1].cpu_share < 0.15
