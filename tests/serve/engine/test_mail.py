"""What comes in is counted and refused, what goes out is delivered in order, whoever posts it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from serve.engine.mail import Inbox, Mailbox, Outbox
from serve.engine.sequence import (
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    SequenceGroup,
    Timings,
    TokenEvent,
    make_group,
)
from serve.errors import EngineStoppedError, QueueFullError
from serve.sampling.params import SamplingParams


def group_of(sink: Any) -> SequenceGroup:
    return make_group(GenerationRequest("r", (1,), SamplingParams()), sink, 0.0)


TOKEN = TokenEvent(0, 0, 5, 0.0, 0.0)
END = FinishedEvent(0, FinishReason.STOP, (5,), (0.0,), Timings())


def test_inbox_refuses_more_than_may_wait_beside_those_that_run() -> None:
    inbox, came = Inbox("small", max_num_seqs=2, max_waiting=3), list[int]()
    inbox.take(4, lambda: came.append(4))
    with pytest.raises(QueueFullError, match="holds 4 sequences and takes at most 3 beyond the 2"):
        inbox.take(2, lambda: came.append(2))
    inbox.check_room(1)
    assert (inbox.num_admitted, inbox.num_inside, came) == (4, 0, [])
    inbox.run()
    assert (inbox.num_admitted, inbox.num_inside, came) == (4, 4, [4])
    inbox.release(4)
    assert (inbox.num_admitted, inbox.num_inside) == (0, 0)


def test_inbox_that_is_closed_takes_cancels_alone() -> None:
    inbox, came = Inbox("closed", 2, 3), list[str]()
    inbox.close()
    with pytest.raises(EngineStoppedError, match="the closed engine is stopping"):
        inbox.take(1, lambda: came.append("work"))
    inbox.tell(lambda: came.append("cancel"))
    inbox.run()
    assert came == ["cancel"]


def test_outbox_counts_out_what_ended_before_its_reader_hears_of_it() -> None:
    inbox, outbox, seen = Inbox("one", 1, 0), Outbox(), list[Any]()
    inbox.take(1, lambda: None)
    inbox.run()
    group = group_of(lambda events: seen.append((events, inbox.num_admitted)))
    outbox.add(group, TOKEN)
    outbox.add_last(group, END)
    outbox.flush(inbox)
    outbox.flush(inbox)
    assert seen == [([TOKEN, END], 0)]


def test_outbox_delivers_to_others_when_a_reader_fails() -> None:
    def gone(events: Any) -> None:
        raise RuntimeError("the loop is closed")

    outbox, seen = Outbox(), list[Any]()
    outbox.add(group_of(gone), TOKEN)
    kept = group_of(seen.append)
    outbox.add(kept, TOKEN)
    outbox.flush(Inbox("one", 1, 0))
    assert seen == [[TOKEN]]


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
