"""Steps of engines that share the same cores, one at a time, the more urgent engine first.

Two thread pools that spin on the same cores ruin each other, so an engine takes the turn for one
step. An engine that has work claims its priority for as long as it has: between two of its steps
the others then leave the cores to it, but never for longer than `max_wait_s`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MAX_WAIT_S = 0.25


class StepArbiter:
    """Hands out turns. Lower priority numbers are more urgent; each engine has its own.

    `waiting` maps who waits to when its patience ends, `holder` is whose turn it is.
    """

    def __init__(self, max_wait_s: float = MAX_WAIT_S) -> None:
        self._condition = threading.Condition()
        self._max_wait_s = max_wait_s
        self.waiting: dict[int, float] = {}
        self._claims: set[int] = set()
        self.holder: int | None = None

    def claim(self, priority: int) -> None:
        """Say that the engine has work, also between its steps."""
        with self._condition:
            self._claims.add(priority)

    def unclaim(self, priority: int) -> None:
        """Say that the engine has no work any more."""
        with self._condition:
            self._claims.discard(priority)
            self._condition.notify_all()

    def drop(self, priority: int) -> None:
        """Take claim and turn away from an engine that hangs, so that the others go on."""
        with self._condition:
            self._claims.discard(priority)
            if self.holder == priority:
                self.holder = None
            self._condition.notify_all()

    @contextmanager
    def turn(self, priority: int) -> Iterator[None]:
        """Hold the turn for the duration of the block."""
        with self._condition:
            overdue_s = time.monotonic() + self._max_wait_s
            self.waiting[priority] = overdue_s
            while not self._is_next(priority):
                # Nobody may tell this engine that its patience is over.
                left_s = overdue_s - time.monotonic()
                self._condition.wait(left_s if left_s > 0 else None)
            del self.waiting[priority]
            self.holder = priority
        try:
            yield
        finally:
            with self._condition:
                if self.holder == priority:
                    self.holder = None
                    self._condition.notify_all()

    def _is_next(self, priority: int) -> bool:
        if self.holder is not None:
            return False
        now_s = time.monotonic()
        overdue = [(since_s, p) for p, since_s in self.waiting.items() if since_s <= now_s]
        if overdue:
            return min(overdue)[1] == priority
        return priority == min({*self.waiting, *self._claims})
