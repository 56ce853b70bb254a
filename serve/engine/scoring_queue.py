"""Scoring requests that wait for an engine: one at a time, and clients take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from serve.engine.scoring import ScoringJob


class ScoringQueue:
    """The first job is the one under way, until it is removed; then the next client's first is."""

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
