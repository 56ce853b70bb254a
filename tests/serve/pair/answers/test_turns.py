"""A lock that tenants take in turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve.pair.answers.turns import FairLock


def with_taken(test: Callable[[FairLock], Awaitable[None]]) -> None:
    async def run() -> None:
        lock = FairLock()
        await lock.acquire("first")
        await test(lock)

    asyncio.run(run())


async def waiter(lock: FairLock, tenant: str, served: list[str], name: str = "") -> None:
    await lock.acquire(tenant)
    served.append(name or tenant)
    lock.release()


def test_tenants_alternate_and_each_ones_are_in_order() -> None:
    async def check(lock: FairLock) -> None:
        served: list[str] = []
        queue = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2"), ("c", "c1")]
        tasks = [asyncio.create_task(waiter(lock, tenant, served, n)) for tenant, n in queue]
        await asyncio.sleep(0)
        assert [lock.num_waiting(tenant) for tenant in "abcd"] == [3, 2, 1, 0]
        lock.release()
        await asyncio.gather(*tasks)
        assert served == ["a1", "b1", "c1", "a2", "b2", "a3"]
        await lock.acquire("d")

    with_taken(check)


def test_tenant_that_held_it_comes_after_others() -> None:
    async def check(lock: FairLock) -> None:
        served: list[str] = []
        tasks = [asyncio.create_task(waiter(lock, t, served)) for t in ("first", "other")]
        await asyncio.sleep(0)
        lock.release()
        await asyncio.gather(*tasks)
        assert served == ["other", "first"]

    with_taken(check)


def test_who_is_gone_is_passed_over() -> None:
    async def check(lock: FairLock) -> None:
        served: list[str] = []
        gone, stays = (asyncio.create_task(waiter(lock, tenant, served)) for tenant in "ab")
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert lock.num_waiting("a") == 0
        lock.release()
        await stays
        assert served == ["b"]

    with_taken(check)


@pytest.mark.parametrize("is_released_first", [True, False])
def test_who_is_gone_when_the_turn_comes_passes_it_on(is_released_first: bool) -> None:
    async def check(lock: FairLock) -> None:
        served: list[str] = []
        gone, stays = (asyncio.create_task(waiter(lock, "a", served, n)) for n in "xy")
        await asyncio.sleep(0)
        if is_released_first:
            lock.release()
        gone.cancel()
        if not is_released_first:
            lock.release()
        await asyncio.wait_for(stays, 5)
        assert served == ["y"]
        await lock.acquire("a")

    with_taken(check)
