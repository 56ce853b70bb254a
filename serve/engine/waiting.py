"""What waits in an engine: for a row, to be scored, and for its deadline.

Sequences wait for a row: clients take turns, and so do the requests of one client.

The client with the fewest rows is next, among equals the one that was served longest ago. Within a
client requests are served as they came, but each for `max_turn` sequences at a time: between two of
its turns others begin, for as many sequences. So neither waits for the end of a long line.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.engine.sequence import Sequence, SequenceGroup

if TYPE_CHECKING:
    from serve.engine.scoring import ScoringJob

_MIN_PRUNED = 256  # deadlines


@dataclass(slots=True, eq=False)
class _Request:
    """The waiting sequences of a group, of which so many others were taken in this turn.

    It has begun with its first turn's end.
    """

    group: SequenceGroup
    sequences: deque[Sequence] = field(default_factory=deque)
    num_taken: int = 0
    has_begun: bool = False


class WaitingLines:
    """A line of requests per client. Holds sequences, and of rows knows how many there are."""

    def __init__(self, max_turn: int) -> None:
        self._max_turn = max_turn
        # By client, the one that was served longest ago first; and by `id` of the group.
        self._lines: dict[str, dict[int, _Request]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            for request in line.values():
                yield from request.sequences

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences wait behind what their clients have waiting."""
        for sequence in sequences:
            self._request(sequence).sequences.append(sequence)
            self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that was taken wait again: its client's next, and alone in its turn."""
        request = self._request(sequence)
        request.sequences.appendleft(sequence)
        request.num_taken, request.has_begun = self._max_turn - 1, True
        self._num_waiting += 1
        client, group_id = sequence.client, id(sequence.group)
        self._lines[client] = {group_id: request, **self._lines[client]}

    def next(
        self, num_rows: Mapping[str, int], max_rows: int, passed_over: Set[int] = frozenset()
    ) -> Sequence | None:
        """Return who is next, where a client may have `max_rows`, and has `num_rows`.

        Groups that are `passed_over` (by `id`) are not considered.
        """
        for client in sorted(self._lines, key=lambda client: num_rows.get(client, 0)):
            if num_rows.get(client, 0) >= max_rows:
                return None
            for request in self._lines[client].values():
                if id(request.group) not in passed_over:
                    return request.sequences[0]
        return None

    @property
    def clients(self) -> Set[str]:
        return self._lines.keys()

    def first_of_each(self, clients: Iterable[str]) -> Iterator[Sequence]:
        """Yield the first sequence of each request of these clients."""
        for client in clients:
            for request in self._lines[client].values():
                yield request.sequences[0]

    def take(self, sequence: Sequence) -> None:
        """Remove the first sequence of a request, and see to whose turn it is then."""
        client, group_id = sequence.client, id(sequence.group)
        line = self._lines.pop(client)
        request = line[group_id]
        assert request.sequences[0] is sequence, "it is not the first of its request"
        request.sequences.popleft()
        self._num_waiting -= 1
        request.num_taken += 1
        if not request.sequences:
            del line[group_id]
        elif request.num_taken >= self._max_turn:
            line = self._behind_others(line, group_id)
        if line:
            self._lines[client] = line

    def _behind_others(self, line: dict[int, _Request], group_id: int) -> dict[int, _Request]:
        """Return a line in which a request whose turn is over stands behind the next turn's worth
        of requests that have not begun, or else behind all."""
        request = line.pop(group_id)
        request.num_taken, request.has_begun = 0, True
        num_new, reordered = 0, dict[int, _Request]()
        for other_id, other in line.items():
            if num_new >= self._max_turn:
                reordered.setdefault(group_id, request)
            reordered[other_id] = other
            num_new += 0 if other.has_begun else len(other.sequences)
        reordered.setdefault(group_id, request)
        return reordered

    def remove(self, group_ids: Set[int]) -> list[Sequence]:
        """Take the sequences of these groups (by `id`) out, and return them."""
        removed = [sequence for sequence in self if id(sequence.group) in group_ids]
        for client in {sequence.client for sequence in removed}:
            line = self._lines[client]
            for group_id in group_ids & line.keys():
                del line[group_id]
            if not line:
                del self._lines[client]
        self._num_waiting -= len(removed)
        return removed

    def clear(self) -> None:
        self._lines.clear()
        self._num_waiting = 0

    def _request(self, sequence: Sequence) -> _Request:
        line = self._lines.setdefault(sequence.client, {})
        return line.setdefault(id(sequence.group), _Request(sequence.group))


class ScoringQueue:
    """Scoring requests, one at a time; clients take turns.

    The first job is the one under way, until it is removed; then the next client's first is."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[ScoringJob]] = {}  # by client, whose turn it is first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[ScoringJob]:
        for line in self._lines.values():
            yield from line

    @property
    def first(self) -> ScoringJob | None:
        return next(iter(self), None)

    def add(self, job: ScoringJob) -> None:
        self._lines.setdefault(job.request.client, deque()).append(job)

    def remove(self, job: ScoringJob) -> None:
        """Take a job out; of the one under way the client has had its turn."""
        client, is_first = job.request.client, job is self.first
        line = self._lines[client]
        line.remove(job)
        if is_first or not line:
            del self._lines[client]
        if is_first and line:
            self._lines[client] = line

    def of(self, request_id: str) -> list[ScoringJob]:
        """Return the jobs of a request."""
        return [job for job in self if job.request.request_id == request_id]

    def clear(self) -> list[ScoringJob]:
        """Forget everything; returns the jobs that were here."""
        jobs = list(self)
        self._lines.clear()
        return jobs


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
