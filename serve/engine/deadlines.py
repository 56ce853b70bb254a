"""When requests must end: the earliest first, and those that ended before forgotten in time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Set

_MIN_PRUNED = 256


def is_past(deadline_s: float | None, now_s: float) -> bool:
    """Say whether a deadline, if there is one, has come."""
    return deadline_s is not None and now_s >= deadline_s


class Deadlines:
    """Holds (deadline, request id) pairs; an id may have several, and outlive its request.

    `live_ids` says which requests have not ended. It is asked now and then, so that memory follows
    what lives and not what was ever added.
    """

    def __init__(self, live_ids: Callable[[], Set[str]]) -> None:
        self._live_ids = live_ids
        self._heap: list[tuple[float, str]] = []
        self._max_len = _MIN_PRUNED

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_s: float, request_id: str) -> None:
        heapq.heappush(self._heap, (deadline_s, request_id))
        if len(self._heap) > self._max_len:
            self._prune()

    def pop_expired(self, now_s: float) -> Iterator[str]:
        """Yield and forget the ids whose deadline has come."""
        while self._heap and self._heap[0][0] <= now_s:
            yield heapq.heappop(self._heap)[1]

    def _prune(self) -> None:
        live_ids = self._live_ids()
        self._heap = [entry for entry in self._heap if entry[1] in live_ids]
        heapq.heapify(self._heap)
        self._max_len = max(_MIN_PRUNED, 2 * len(self._heap))
