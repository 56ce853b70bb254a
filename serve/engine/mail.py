"""What is asked of an engine on its way in, and what it answers on its way out.

Inbox: counted, refused where there is too much, and handed over. Outbox: one delivery per pass and
request. Mailbox: from engines' threads to the asyncio loop, which wakes once for all of a pass.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from serve.engine.sequence import Event, EventSink, FinishedEvent, SequenceGroup, TokenEvent
from serve.errors import EngineStoppedError, QueueFullError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0

Command = Callable[[], None]
Deliver = Callable[[list[Event]], None]


class Inbox:
    """The ledger of an engine: its samples and scoring requests from `take` to `release`.

    `num_admitted` of them were taken; the engine's thread has got `num_inside`. `run`, `wait` and
    `release` are for that thread, which runs the commands; the rest is thread-safe.
    """

    def __init__(self, name: str, max_num_seqs: int, max_waiting: int) -> None:
        self._name = name
        self._max_num_seqs = max_num_seqs
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[tuple[int, Command]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.num_admitted = 0
        self.num_inside = 0
        self.is_closed = False

    def take(self, count: int, command: Command) -> None:
        """Count new work and hand it over. Raises QueueFullError, EngineStoppedError."""
        with self._lock:
            self.check_room(count)
            self.num_admitted += count
            self._commands.put((count, command))

    def check_room(self, count: int) -> None:
        """Raise as `take`; without its lock it says what was so a moment ago."""
        if self.is_closed:
            raise EngineStoppedError(f"the {self._name} engine is stopping")
        if self.num_admitted + count > self._max_waiting + self._max_num_seqs:
            raise QueueFullError(
                f"the {self._name} queue holds {self.num_admitted} sequences and takes at "
                f"most {self._max_waiting} beyond the {self._max_num_seqs} that run",
                RETRY_AFTER_S,
            )

    def tell(self, command: Command) -> None:
        """Hand over what is no new work, also to an engine that stops."""
        self._commands.put((0, command))

    def close(self) -> None:
        """Take nothing more, and wake the engine."""
        with self._lock:
            self.is_closed = True
        self.tell(lambda: None)

    def run(self) -> None:
        """Run the commands that are there."""
        while not self._commands.empty():
            try:
                command = self._commands.get_nowait()
            except queue.Empty:  # another thread, which ends the engine, was faster
                return
            self._obey(*command)

    def wait(self) -> None:
        """Run the next command, when it comes."""
        self._obey(*self._commands.get())

    def _obey(self, count: int, command: Command) -> None:
        self.num_inside += count
        command()

    def release(self, count: int) -> None:
        """Count what has ended out."""
        with self._lock:
            self.num_admitted -= count
        self.num_inside -= count


class Outbox:
    """Collects events by request, and the outcomes of scoring requests."""

    def __init__(self) -> None:
        # By `id` of the group, which is held here: no other may come to have the same.
        self._events: dict[int, tuple[SequenceGroup, list[Event]]] = {}
        self._outcomes: list[Command] = []
        self._num_ended = 0

    def add(self, group: SequenceGroup, event: TokenEvent) -> None:
        self._events.setdefault(id(group), (group, []))[1].append(event)

    def add_last(self, group: SequenceGroup, event: FinishedEvent) -> None:
        self._num_ended += 1
        self._events.setdefault(id(group), (group, []))[1].append(event)

    def add_outcome(self, tell: Command) -> None:
        """Have `tell` say how a scoring request ended."""
        self._num_ended += 1
        self._outcomes.append(tell)

    def flush(self, inbox: Inbox) -> None:
        """Deliver everything, what has ended counted out first: its reader may come back with more.

        A reader that fails is logged and disturbs no other.
        """
        if self._num_ended:
            inbox.release(self._num_ended)
            self._num_ended = 0
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            for tell in outcomes:
                tell()
        events, self._events = self._events, {}
        for group, group_events in events.values():
            try:
                group.sink(group_events)
            except Exception:
                # A reader that is gone is no reason to fail the others.
                logger.exception("a reader of an engine's events failed")


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
