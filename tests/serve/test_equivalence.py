"""The worker that compares and extracts answers: a real child process, and what ends it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve import answer_child, equivalence
from serve.equivalence import AnswerWorker, SymbolicUnavailableError, check_available, is_available

HANGING = ("(a+)+$", "a" * 40 + "b")
TOWER = ("9^{9^{9^9}}", "9^{9^{9^8}}")


@asynccontextmanager
async def started(timeout_s: float = 0.3, **options: Any) -> AsyncIterator[AnswerWorker]:
    worker = AnswerWorker(timeout_s, **options)
    try:
        await worker.extract("", [])
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


def pid_of(worker: AnswerWorker) -> int | None:
    return worker._child._process.pid if worker._child else None


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
        outcomes = await worker.equivalent([pair for pair, _ in pairs])
        assert list(zip([p for p, _ in pairs], outcomes, strict=True)) == pairs

    with_worker(check, timeout_s=20)


def test_group_1_of_the_last_match_is_extracted() -> None:
    async def check(worker: AnswerWorker) -> None:
        texts = ["a=1 a=2", "none", "", "ü=3 b=ü"]
        assert await worker.extract(r"\w=(\w)", texts) == ["2", None, None, "ü"]
        assert await worker.extract("x|(y)", ["yx"]) == [None]
        assert await worker.extract("x", ["x"]) == [None]

    with_worker(check)


def test_a_job_that_hangs_is_ended_and_the_others_have_results() -> None:
    async def check(worker: AnswerWorker) -> None:
        pattern, text = HANGING
        assert await worker.extract(pattern, ["aa", text, "aaa"]) == ["aa", None, "aaa"]
        assert worker.num_failures == 1
        assert await worker.equivalent([TOWER]) == [None]
        assert await worker.equivalent([("1+1", "2")]) == [True]

    with_worker(check, timeout_s=0.5)


def test_a_call_gives_up_after_two_jobs_without_a_result() -> None:
    async def check(worker: AnswerWorker) -> None:
        pattern, text = HANGING
        assert await worker.extract(pattern, [text, text, "aa"]) == [None] * 3
        assert worker.num_failures == 2

    with_worker(check, timeout_s=0.05)


def test_a_job_that_takes_too_much_memory_has_no_result() -> None:
    async def check(worker: AnswerWorker) -> None:
        assert await worker.extract("(a)", ["a" * (64 << 20)]) == [None]
        assert await worker.extract("(a)", ["a"]) == ["a"]
        assert worker.num_failures == 1

    with_worker(check, timeout_s=20, memory_bytes=128 << 20)


def test_a_killed_child_is_replaced() -> None:
    async def check(worker: AnswerWorker) -> None:
        assert worker._child is not None
        first = pid_of(worker)
        job = asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]]))
        await asyncio.sleep(0.05)
        worker._child.kill()
        assert await job == [None]
        assert await worker.extract("(a)", ["a"]) == ["a"]
        assert pid_of(worker) not in (None, first)

    with_worker(check, timeout_s=20)


def test_a_child_that_died_between_jobs_costs_none() -> None:
    async def check(worker: AnswerWorker) -> None:
        assert worker._child is not None
        worker._child.kill()
        await asyncio.to_thread(worker._child._process.wait)
        assert await worker.extract("(a)", ["a"]) == ["a"]
        assert worker.num_failures == 0

    with_worker(check)


def test_a_child_without_a_parent_ends_a_hanging_job_itself() -> None:
    async def check(worker: AnswerWorker) -> None:
        child = worker._child
        assert child is not None
        asked = asyncio.create_task(child.ask("extract", HANGING, timeout_s=-0.9))
        with pytest.raises(TimeoutError):
            await asked  # the parent is gone; 0.1 s later the alarm rings
        await asyncio.to_thread(child._process.wait, 20)
        assert child._process.returncode == -signal.SIGALRM

    with_worker(check)


def test_the_loop_keeps_its_pace_while_a_job_hangs() -> None:
    async def check(worker: AnswerWorker) -> None:
        job = asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]]))
        num_ticks = 0
        while not job.done():
            await asyncio.sleep(0.005)
            num_ticks += 1
        assert await job == [None]
        assert num_ticks >= 10  # about 60 where nothing else runs; 1 if the loop waited

    with_worker(check)


def test_calls_beyond_the_bound_have_no_results_at_once() -> None:
    async def check(worker: AnswerWorker) -> None:
        busy = asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]]))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(worker.extract("(a)", ["a"]))
        await asyncio.sleep(0)
        assert await worker.equivalent([("1", "1"), ("2", "2")]) == [None, None]
        assert worker.num_dropped == 2
        assert not busy.done()
        assert await waiting == ["a"]

    with_worker(check, max_waiting=1)


def test_callers_that_are_gone_cost_nothing() -> None:
    async def check(worker: AnswerWorker) -> None:
        busy = asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]]))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]] * 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(busy, gone, return_exceptions=True)
        assert await worker.extract("(a)", ["a"]) == ["a"]
        assert worker.num_failures == 1

    with_worker(check)


def test_stop_ends_the_child_and_calls_that_wait() -> None:
    async def run() -> None:
        async with started(timeout_s=60) as worker:
            child = worker._child
            assert child is not None
            calls = [asyncio.create_task(worker.extract(HANGING[0], [HANGING[1]])) for _ in "ab"]
            await asyncio.sleep(0.05)
            began_s = time.monotonic()
            await worker.stop()
            assert time.monotonic() - began_s < 5
            assert await asyncio.gather(*calls) == [[None], [None]]
            assert not child.is_alive
            assert await worker.extract("(a)", ["a"]) == [None]
            assert (worker.num_failures, worker.num_dropped) == (0, 1)

    asyncio.run(run())


def test_start_makes_the_first_comparison_quick() -> None:
    async def run() -> None:
        worker = AnswerWorker(20)
        await worker.start()
        assert worker._child is not None
        assert worker._child._prepared == {"equivalent"}
        await worker.stop()
        assert not worker._child

    asyncio.run(run())


def test_nothing_runs_before_the_first_call() -> None:
    async def run() -> None:
        worker = AnswerWorker(1)
        assert worker._child is None
        assert worker._runner is None
        await worker.stop()

    asyncio.run(run())


@pytest.mark.parametrize("interpreter", ["/nonexistent", "/bin/false"])
def test_a_child_that_does_not_start_leaves_no_results(
    interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence.sys, "executable", interpreter)

    async def run() -> None:
        worker = AnswerWorker(1)
        assert await worker.extract("(a)", ["a"]) == [None]
        assert worker.num_failures > 0
        await worker.stop()

    asyncio.run(run())


def test_symbolic_matching_needs_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_available()
    check_available()
    monkeypatch.setattr(equivalence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SymbolicUnavailableError, match="math-verify"):
        check_available()


def test_a_comparison_that_breaks_math_verify_finds_nothing(
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
