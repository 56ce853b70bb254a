"""One run per request, whoever asks for it, and what is remembered of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError
from serve.replay import Emit, Replays, RunKey

KEY = RunKey("tenant", "id")


class Run:
    """Emits `texts` one by one, each when the test lets it; counts how often it began and ended."""

    def __init__(self, *texts: str, is_held: bool = False, error: Exception | None = None) -> None:
        self.texts = texts
        self.error = error
        self.may_go_on = asyncio.Event()
        if not is_held:
            self.may_go_on.set()
        self.num_begun = 0
        self.num_cancelled = 0

    async def __call__(self, emit: Emit) -> None:
        self.num_begun += 1
        try:
            for text in self.texts:
                emit(pb.TokenChunk(text=text))
                await self.may_go_on.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


async def texts_of(replays: Replays, run: Run, **settings: Any) -> list[str]:
    call = {"key": KEY, "digest": b"1", "is_kept": True} | settings
    async with aclosing(replays.follow(run=run, **call)) as responses:
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
async def test_last_follower_that_leaves_ends_the_run() -> None:
    replays, run = make(), Run("a", "b", is_held=True)
    followers = [asyncio.create_task(texts_of(replays, run)) for _ in range(2)]
    await asyncio.sleep(0.01)
    followers[0].cancel()
    await asyncio.wait([followers[0]])
    assert run.num_cancelled == 0
    followers[1].cancel()
    await asyncio.wait([followers[1]])
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
