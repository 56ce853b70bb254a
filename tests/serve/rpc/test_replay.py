"""One run per request, whoever asks for it, and what is remembered of it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import DeadlineError, InvalidFieldError
from serve.rpc.replay import Emit, Replays, RunKey

KEY = RunKey("tenant", "id")


class Chunk:
    """Stands for a message of so many bytes; unlike those it can be referred to weakly."""

    def __init__(self, text: str) -> None:
        self.text = text

    def ByteSize(self) -> int:  # noqa: N802
        return len(self.text)


class Run:
    """Emits `texts` one by one, each when the test lets it; counts how often it began and ended."""

    def __init__(
        self,
        *texts: str,
        is_held: bool = False,
        is_final: bool = True,
        error: Exception | None = None,
        kind: Any = pb.TokenChunk,
    ) -> None:
        self.texts = texts
        self.is_final = is_final
        self.error = error
        self.kind = kind
        self.may_go_on = asyncio.Event()
        if not is_held:
            self.may_go_on.set()
        self.num_begun = 0
        self.num_cancelled = 0

    async def __call__(self, emit: Emit) -> bool:
        self.num_begun += 1
        try:
            for text in self.texts:
                emit(self.kind(text=text))
                await self.may_go_on.wait()
            if self.error is not None:
                raise self.error
            return self.is_final
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def follow(replays: Replays, run: Run, **settings: Any) -> AsyncGenerator[Any, None]:
    call = {"key": KEY, "digest": b"1", "is_kept": True, "deadline_s": 100.0} | settings
    return replays.follow(run=run, **call)


async def texts_of(replays: Replays, run: Run, **settings: Any) -> list[str]:
    async with aclosing(follow(replays, run, **settings)) as responses:
        return [response.text async for response in responses]


def make(
    max_runs: int = 10, max_bytes: int = 1000, clock: Callable[[], float] = lambda: 0.0
) -> Replays:
    return Replays(max_runs, max_bytes, ttl_s=60, clock=clock)


def async_test(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))

    return run


@async_test
async def test_finished_run_is_replayed() -> None:
    replays, run = make(), Run("a", "b")
    assert await texts_of(replays, run) == await texts_of(replays, run) == ["a", "b"]
    assert run.num_begun == 1


@async_test
async def test_running_one_is_followed_from_its_beginning() -> None:
    replays, run = make(), Run("a", "b", is_held=True)
    first = asyncio.create_task(texts_of(replays, run))
    await asyncio.sleep(0)
    second = asyncio.create_task(texts_of(replays, run))
    await asyncio.sleep(0.01)
    run.may_go_on.set()
    assert await first == await second == ["a", "b"]
    assert run.num_begun == 1


@pytest.mark.parametrize("digest", [b"2"])
def test_id_of_a_different_request_is_refused(digest: bytes) -> None:
    async def test() -> None:
        replays = make()
        await texts_of(replays, Run("a"))
        with pytest.raises(InvalidFieldError, match="request_id: is 'id'"):
            await texts_of(replays, Run("b"), digest=digest)

    asyncio.run(test())


@async_test
async def test_tenants_do_not_see_each_others_ids() -> None:
    replays = make()
    await texts_of(replays, Run("a"))
    other = RunKey("other tenant", "id")
    assert await texts_of(replays, Run("b"), key=other, digest=b"2") == ["b"]


@async_test
async def test_failure_is_told_and_not_replayed() -> None:
    replays = make()
    with pytest.raises(ZeroDivisionError):
        await texts_of(replays, Run("a", error=ZeroDivisionError()))
    assert await texts_of(replays, Run("b")) == ["b"]


@async_test
async def test_answer_that_is_not_whole_is_not_replayed() -> None:
    replays, run = make(), Run("a", is_final=False)
    assert await texts_of(replays, run) == await texts_of(replays, run) == ["a"]
    assert run.num_begun == 2


@async_test
async def test_answer_above_the_bound_is_not_kept_and_displaces_no_other() -> None:
    replays, small, large = make(max_bytes=20), Run("x"), Run("x" * 30)
    other = RunKey("", "large")
    for _ in range(2):
        await texts_of(replays, small)
        await texts_of(replays, large, key=other)
    assert (small.num_begun, large.num_begun) == (1, 2)


@async_test
async def test_answer_that_outgrows_the_bound_is_forgotten_as_it_is_read() -> None:
    emitted: list[weakref.ref[Chunk]] = []

    def chunk(text: str) -> Chunk:
        made = Chunk(text)
        emitted.append(weakref.ref(made))
        return made

    replays, run = make(max_bytes=20), Run(*["x" * 10] * 9, is_held=True, kind=chunk)
    async with aclosing(follow(replays, run)) as one, aclosing(follow(replays, run)) as other:
        assert [(await anext(r)).text for r in (one, other)] == ["x" * 10] * 2
        run.may_go_on.set()
        await asyncio.sleep(0.01)
        assert await texts_of(replays, Run("later")) == ["later"]
        assert len([response async for response in one]) == 8
        await anext(other)
        assert [each() is None for each in emitted] == [True] + [False] * 8
        assert len([response async for response in other]) == 7
        assert [each() for each in emitted] == [None] * 9
    assert run.num_begun == 1


@async_test
async def test_runs_that_go_on_share_the_bound_and_the_largest_is_given_up() -> None:
    replays = make(max_bytes=50)
    runs = {n: Run("x" * n, is_held=True) for n in (10, 30, 20)}
    ends = [
        asyncio.create_task(texts_of(replays, run, key=RunKey("", str(n))))
        for n, run in runs.items()
    ]
    await asyncio.sleep(0.01)
    for run in runs.values():
        run.may_go_on.set()
    assert await asyncio.gather(*ends) == [["x" * n] for n in runs]
    for n in sorted(runs):
        await texts_of(replays, runs[n], key=RunKey("", str(n)))
    assert {n: run.num_begun for n, run in runs.items()} == {10: 1, 30: 2, 20: 1}


@async_test
async def test_runs_that_end_badly_leave_their_part_of_the_bound_to_others() -> None:
    replays = make(max_bytes=20)
    with pytest.raises(ZeroDivisionError):
        await texts_of(replays, Run("x" * 15, error=ZeroDivisionError()))
    left = asyncio.create_task(texts_of(replays, Run("x" * 15, is_held=True)))
    await asyncio.sleep(0.01)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    run = Run("x" * 15)
    await texts_of(replays, run)
    await texts_of(replays, run)
    assert run.num_begun == 1


@pytest.mark.parametrize(("deadline_s", "num_begun"), [(100.0, 2), (0.0, 1)])
def test_run_that_ended_by_its_deadline_begins_again_for_a_later_one(
    deadline_s: float, num_begun: int
) -> None:
    async def test() -> None:
        replays, run = make(), Run()
        gate = asyncio.Event()

        async def wait_then_fail(emit: Emit) -> bool:
            run.num_begun += 1
            await gate.wait()
            if run.num_begun == 1:
                raise DeadlineError("too late")
            emit(pb.TokenChunk(text="a"))
            return True

        first = asyncio.create_task(texts_of(replays, wait_then_fail))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        second = asyncio.create_task(
            texts_of(replays, wait_then_fail, deadline_s=deadline_s)  # type: ignore[arg-type]
        )
        await asyncio.sleep(0.01)
        gate.set()
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(found[0], DeadlineError)
        assert found[1] == ["a"] if num_begun == 2 else isinstance(found[1], DeadlineError)
        assert run.num_begun == num_begun

    asyncio.run(test())


@async_test
async def test_last_follower_that_leaves_ends_the_run() -> None:
    replays, run = make(), Run("a", "b", is_held=True)
    readers = [asyncio.create_task(texts_of(replays, run)) for _ in range(2)]
    await asyncio.sleep(0.01)
    readers[0].cancel()
    await asyncio.wait([readers[0]])
    assert run.num_cancelled == 0
    readers[1].cancel()
    await asyncio.wait([readers[1]])
    assert run.num_cancelled == 1
    assert await texts_of(replays, Run("c")) == ["c"]


@async_test
async def test_run_that_is_not_kept_is_forgotten_as_it_is_read() -> None:
    replays, run = make(), Run("a")
    for _ in range(2):
        assert await texts_of(replays, run, is_kept=False) == ["a"]
    assert run.num_begun == 2


@pytest.mark.parametrize("bounds", [{"max_runs": 2}, {"max_bytes": 7}])
def test_oldest_runs_are_forgotten_first(bounds: dict[str, int]) -> None:
    async def test() -> None:
        replays, runs = make(**bounds), [Run("x") for _ in range(3)]
        keys = [RunKey("", str(number)) for number in range(3)]
        for key, run in zip(keys, runs, strict=True):
            await texts_of(replays, run, key=key)
        for key, run in reversed(list(zip(keys, runs, strict=True))):
            await texts_of(replays, run, key=key)
        assert [run.num_begun for run in runs] == [2, 1, 1]

    asyncio.run(test())


@async_test
async def test_run_is_forgotten_when_its_time_is_over() -> None:
    now_s = 0.0
    replays, run = make(clock=lambda: now_s), Run("a")
    await texts_of(replays, run)
    now_s = 59.0
    await texts_of(replays, run)
    assert run.num_begun == 1
    now_s = 60.0
    await texts_of(replays, run)
    assert run.num_begun == 2
