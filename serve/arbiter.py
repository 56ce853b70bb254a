"""Steps of engines that share the same cores, one at a time.

Two thread pools that spin on the same cores ruin each other. An engine takes the turn for one
step; among those that wait, the lowest priority number goes first.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepArbiter:
    """A lock that is handed to the waiting engine with the lowest priority number."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._arrivals = itertools.count()
        self._is_taken = False

    @contextmanager
    def turn(self, priority: int) -> Iterator[None]:
        """Hold the turn for the duration of the block."""
        with self._condition:
            ticket = (priority, next(self._arrivals))
            heapq.heappush(self._waiting, ticket)
            self._condition.wait_for(lambda: not self._is_taken and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._is_taken = True
        try:
            yield
        finally:
            with self._condition:
                self._is_taken = False
                self._condition.notify_all()
