"""The worker that compares and extracts answers: a real child process, and what ends it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve.pair.answers import child as answer_child
from serve.pair.answers.equivalence import (
    AnswerWorker,
    NoResult,
    SymbolicUnavailableError,
    WorkerClaim,
    check_available,
    is_available,
)

HANGING = ("(a+)+$", "a" * 40 + "b")
TOWER = ("9^{9^{9^9}}", "9^{9^{9^8}}")
TIMEOUT, FAILED, DROPPED = NoResult.TIMEOUT, NoResult.FAILED, NoResult.DROPPED


@asynccontextmanager
async def started(timeout_s: float = 0.3, **options: Any) -> AsyncIterator[AnswerWorker]:
    worker = AnswerWorker(timeout_s, **options)
    try:
        await extract(worker, ("()", ""))
        yield worker
    finally:
        await worker.stop()


def with_worker(
    test: Callable[[AnswerWorker], Awaitable[None]], timeout_s: float = 0.3, **options: Any
) -> None:
    async def run() -> None:
        async with started(timeout_s, **options) as worker:
            await test(worker)

    asyncio.run(run())


async def extract(
    worker: AnswerWorker, *jobs: tuple[str, str], claim: WorkerClaim | None = None
) -> list[Any]:
    """Do all jobs, (pattern, text) each, in one turn."""
    async with worker.turn(claim if claim is not None else WorkerClaim()) as turn:
        return [await turn.extract(pattern, text) for pattern, text in jobs]


async def equivalent(worker: AnswerWorker, pairs: Sequence[tuple[str, str]]) -> list[Any]:
    async with worker.turn(WorkerClaim()) as turn:
        return [await turn.equivalent(gold, answer) for gold, answer in pairs]


async def begun(worker: AnswerWorker, claim: WorkerClaim | None = None) -> asyncio.Task[list[Any]]:
    """Return a request that hangs, once its turn has begun or it waits for it."""
    task = asyncio.create_task(extract(worker, HANGING, claim=claim))
    await asyncio.sleep(0.01)
    return task


Process = subprocess.Popen[bytes]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The processes that workers have started, in order."""
    started: list[Process] = []

    def popen(*args: Any, **kwargs: Any) -> Process:
        started.append(start(*args, **kwargs))
        return started[-1]

    start = subprocess.Popen
    monkeypatch.setattr("serve.pair.answers.equivalence.subprocess.Popen", popen)
    return started


def test_equivalent_expressions_are_found() -> None:
    pairs = [
        (("(x+1)^2", "x^2+2x+1"), True),
        (("1/2", "0.5"), True),
        (("\\frac{1}{2}", "0.5"), True),
        (("\\sqrt{8}", "2sqrt(2)"), True),
        (("sin(x)^2", "1 - cos(x)^2"), True),
        (("x**2", "x^2"), True),
        (("x = 3", "3"), True),
        (("1, 2", "2, 1"), True),
        (("2 pi", "\\pi"), False),
        (("x+1", "y+1"), False),
        (("5 km", "5"), False),
        (("$5$ or so", "5"), False),
        (("1+", "1"), False),
        (("", "1"), False),
    ]

    async def check(worker: AnswerWorker) -> None:
        outcomes = await equivalent(worker, [pair for pair, _ in pairs])
        assert list(zip([p for p, _ in pairs], outcomes, strict=True)) == pairs

    with_worker(check, timeout_s=20)


def test_group_1_of_the_last_match_is_extracted() -> None:
    async def check(worker: AnswerWorker) -> None:
        found = [(r"\w=(\w)", text) for text in ("a=1 a=2", "none", "", "ü=3 b=ü")]
        assert await extract(worker, *found) == ["2", None, None, "ü"]
        assert await extract(worker, ("x|(y)", "yx")) == [None]

    with_worker(check)


def test_job_that_hangs_is_ended_and_the_others_have_results() -> None:
    async def check(worker: AnswerWorker) -> None:
        claim, short = WorkerClaim(), ("(a+)+$", "aa")
        assert await extract(worker, short, HANGING, short, claim=claim) == ["aa", TIMEOUT, "aa"]
        assert (claim.num_failures, claim.spent) == (1, None)
        assert await equivalent(worker, [TOWER]) == [TIMEOUT]
        assert await equivalent(worker, [("1+1", "2")]) == [True]

    with_worker(check, timeout_s=0.5)


def test_claim_is_spent_after_two_failures() -> None:
    async def check(worker: AnswerWorker) -> None:
        claim, short = WorkerClaim(), ("(a)", "a")
        assert await extract(worker, HANGING, short, HANGING, claim=claim) == [
            TIMEOUT, "a", TIMEOUT,
        ]  # fmt: skip
        assert await extract(worker, short, claim=claim) == [TIMEOUT]
        assert await extract(worker, short) == ["a"]

    with_worker(check, timeout_s=0.1)


def test_claim_is_spent_after_twice_the_time_limit_of_a_job() -> None:
    async def check(worker: AnswerWorker) -> None:
        claim = WorkerClaim(used_s=7199.9)
        assert await extract(worker, HANGING, ("(a)", "a"), claim=claim) == [TIMEOUT, TIMEOUT]
        assert claim.num_failures == 1

    with_worker(check, timeout_s=3600)


def test_job_ends_before_the_deadline() -> None:
    async def check(worker: AnswerWorker) -> None:
        claim = WorkerClaim(deadline_s=time.monotonic() + 0.4)
        assert await extract(worker, HANGING, ("(a)", "a"), claim=claim) == [TIMEOUT, TIMEOUT]
        assert await extract(worker, ("(a)", "a"), claim=claim) == [TIMEOUT]

    with_worker(check, timeout_s=3600)


def test_turn_is_awaited_until_the_deadline_at_most() -> None:
    async def check(worker: AnswerWorker) -> None:
        busy = await begun(worker)
        claim = WorkerClaim(deadline_s=time.monotonic() + 0.2)
        assert await extract(worker, ("(a)", "a"), claim=claim) == [TIMEOUT]
        assert not busy.done()
        busy.cancel()

    with_worker(check, timeout_s=3600)


def test_claim_waits_four_time_limits_in_all() -> None:
    async def check(worker: AnswerWorker) -> None:
        async with worker.turn(WorkerClaim()) as turn:
            await turn.extract("(a)", "a")
            claim = WorkerClaim(waited_s=0.1)
            assert await extract(worker, ("(a)", "a"), claim=claim) == [TIMEOUT]
            assert claim.waited_s > 0.399
        assert await extract(worker, ("(a)", "a")) == ["a"]

    with_worker(check, timeout_s=0.1)


def test_job_that_takes_too_much_memory_has_no_result() -> None:
    async def check(worker: AnswerWorker) -> None:
        jobs = [("(a)", "a" * (64 << 20)), ("(a)", "a")]
        assert await extract(worker, *jobs) == [FAILED, "a"]

    with_worker(check, timeout_s=20, memory_bytes=128 << 20)


def test_killed_child_is_replaced(children: list[Process]) -> None:
    async def check(worker: AnswerWorker) -> None:
        job = await begun(worker)
        children[0].kill()
        assert await job == [FAILED]
        assert await extract(worker, ("(a)", "a")) == ["a"]
        assert len(children) == 2

    with_worker(check, timeout_s=20)


def test_child_that_died_between_jobs_costs_none(children: list[Process]) -> None:
    async def check(worker: AnswerWorker) -> None:
        children[0].kill()
        await asyncio.to_thread(children[0].wait)
        assert await extract(worker, ("(a)", "a")) == ["a"]

    with_worker(check)


def test_child_without_a_parent_ends_a_hanging_job_itself() -> None:
    job = {"name": "extract", "arguments": HANGING, "alarm_s": 0.1}
    message = json.dumps(job).encode()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", answer_child.__file__, str(1 << 30)]
    with ours, theirs, subprocess.Popen(command, stdin=theirs.fileno()) as child:
        ours.sendall(answer_child.HEADER.pack(len(message)) + message)
        assert child.wait(20) == -signal.SIGALRM


def test_loop_keeps_its_pace_while_a_job_hangs() -> None:
    async def check(worker: AnswerWorker) -> None:
        job = await begun(worker)
        for _ in range(10):
            await asyncio.sleep(0.005)
        assert not job.done()
        job.cancel()

    with_worker(check, timeout_s=3600)


def test_tenants_requests_beyond_the_bound_have_no_results_at_once() -> None:
    async def check(worker: AnswerWorker) -> None:
        busy = await begun(worker)
        waiting = await begun(worker)
        assert await extract(worker, ("1", "1"), ("2", "2")) == [DROPPED, DROPPED]
        other = asyncio.create_task(extract(worker, ("(a)", "a"), claim=WorkerClaim("other")))
        assert not busy.done()
        results = [await task for task in (busy, waiting, other)]
        assert results == [[TIMEOUT], [TIMEOUT], ["a"]]

    with_worker(check, max_waiting=1)


def test_innocent_tenant_waits_for_one_hanging_job_of_another_that_floods() -> None:
    async def check(worker: AnswerWorker) -> None:
        claims = [WorkerClaim("flood") for _ in range(5)]
        flood = [
            asyncio.create_task(extract(worker, HANGING, HANGING, claim=claim)) for claim in claims
        ]
        await asyncio.sleep(0.01)
        assert await extract(worker, ("(a)", "a"), claim=WorkerClaim("innocent")) == ["a"]
        assert sum(claim.num_failures for claim in claims) == 1
        for task in flood:
            task.cancel()

    with_worker(check, timeout_s=0.2)


def test_who_is_gone_costs_nothing() -> None:
    async def check(worker: AnswerWorker) -> None:
        busy, waiting = await begun(worker), await begun(worker)
        for task in (waiting, busy):
            task.cancel()
        assert await extract(worker, ("(a)", "a")) == ["a"]

    with_worker(check, timeout_s=3600)


def test_stop_ends_the_child_and_requests_that_wait(children: list[Process]) -> None:
    async def run() -> None:
        async with started(timeout_s=3600) as worker:
            calls = [await begun(worker) for _ in "ab"]
            await worker.stop()
            assert await asyncio.gather(*calls) == [[DROPPED], [DROPPED]]
            assert [child.returncode for child in children] == [-signal.SIGKILL]
            assert await extract(worker, ("(a)", "a")) == [DROPPED]

    asyncio.run(run())


@pytest.mark.parametrize("num_turns", range(6))
def test_stop_while_the_child_starts_waits_for_no_job(num_turns: int) -> None:
    async def run() -> None:
        worker = AnswerWorker(3600)
        job = asyncio.create_task(extract(worker, HANGING))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await worker.stop()
        assert await job == [DROPPED]

    asyncio.run(run())


def test_nothing_runs_before_the_first_job(children: list[Process]) -> None:
    async def run() -> None:
        worker = AnswerWorker(1)
        async with worker.turn(WorkerClaim()):
            assert children == []
        await worker.stop()

    asyncio.run(run())


@pytest.mark.parametrize("interpreter", ["/nonexistent", "/bin/false"])
def test_child_that_does_not_start_leaves_no_results(
    interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.pair.answers.equivalence.sys.executable", interpreter)

    async def run() -> None:
        worker = AnswerWorker(1)
        assert await extract(worker, ("(a)", "a")) == [FAILED]
        await worker.stop()

    asyncio.run(run())


def test_symbolic_matching_needs_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_available()
    check_available()
    monkeypatch.setattr(
        "serve.pair.answers.equivalence.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(SymbolicUnavailableError, match="math-verify"):
        check_available()


def test_comparison_that_breaks_math_verify_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> bool:
        raise error

    monkeypatch.setattr("math_verify.verify", fail)
    error: BaseException = RecursionError()
    assert answer_child.are_equivalent("1", "1") is False
    error = MemoryError()
    with pytest.raises(MemoryError):
        answer_child.are_equivalent("1", "1")
