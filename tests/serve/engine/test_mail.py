"""Events cross to the loop in order, whoever posts them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from serve.engine.mail import Mailbox


def test_loop_wakes_once_for_what_came_together(monkeypatch: Any) -> None:
    async def main() -> None:
        loop, wakes = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *args: (wakes.append(1), call(*args))
        )
        mailbox, got = Mailbox(), []
        first, second = (mailbox.sink(lambda events, n=n: got.append((n, events))) for n in (1, 2))
        first(["a"])
        second(["b"])
        first(["c"])
        await asyncio.sleep(0)
        assert got == [(1, ["a"]), (2, ["b"]), (1, ["c"])] and len(wakes) == 1
        first(["d"])
        await asyncio.sleep(0)
        assert got[-1] == (1, ["d"]) and len(wakes) == 2

    asyncio.run(main())


def test_nothing_is_lost_when_threads_post_at_once() -> None:
    num_threads, num_events = 4, 2000

    async def main() -> None:
        mailbox, got, is_done = Mailbox(), [], asyncio.Event()

        def deliver(events: list[Any]) -> None:
            got.extend(events)
            if len(got) == num_threads * num_events:
                is_done.set()

        sink = mailbox.sink(deliver)

        def post(thread: int) -> None:
            for number in range(num_events):
                sink([(thread, number)])

        threads = [threading.Thread(target=post, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(is_done.wait(), 30)
        for thread in threads:
            thread.join()
        for i in range(num_threads):
            assert [number for owner, number in got if owner == i] == list(range(num_events))

    asyncio.run(main())
