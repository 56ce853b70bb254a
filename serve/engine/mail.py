"""Events from engines' threads to the asyncio loop, which wakes once for all that a step made."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from serve.engine.sequence import Event, EventSink

Deliver = Callable[[list[Event]], None]


class Mailbox:
    """One per loop; any thread may post. A wake-up costs the engine a system call."""

    def __init__(self) -> None:
        self._letters: deque[tuple[Deliver, list[Event]]] = deque()
        self._is_called = False

    def sink(self, deliver: Deliver) -> EventSink:
        """Return a sink for engines that has `deliver` called on the loop that runs now."""
        loop = asyncio.get_running_loop()

        def post(events: list[Event]) -> None:
            self._letters.append((deliver, events))
            if not self._is_called:
                self._is_called = True
                loop.call_soon_threadsafe(self._empty)

        return post

    def _empty(self) -> None:
        # First the flag: whoever posts behind it calls again, whoever posted before is served now.
        self._is_called = False
        while self._letters:
            deliver, events = self._letters.popleft()
            deliver(events)
