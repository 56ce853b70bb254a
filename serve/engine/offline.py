"""An engine that works for one caller, on the caller's thread: for exports and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from serve.engine.engine import Engine
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.engine.sequence import Event, FinishedEvent, GenerationRequest


class OfflineEngine:
    """Drives an engine that nobody starts. A step that fails raises what the model raised."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(
        self, requests: Iterable[GenerationRequest]
    ) -> Iterator[tuple[GenerationRequest, FinishedEvent]]:
        """Run all requests together; yields every sample's end, as they come.

        Raises:
            QueueFullError: they have more samples than the engine lets wait.
        """
        ended: list[tuple[GenerationRequest, FinishedEvent]] = []
        for request in requests:
            self.engine.submit(request, partial(_keep_ends, ended, request))
        for _ in self.run():
            yield from ended
            ended.clear()

    def score(self, requests: Iterable[ScoringRequest]) -> list[list[ScoredCompletion]]:
        """Score all requests; returns, for each, its completions in order."""
        futures = [self.engine.score(request) for request in requests]
        for _ in self.run():
            pass
        return [future.result(0) for future in futures]

    def run(self) -> Iterator[None]:
        """Work until nothing is left, yielding after each step."""
        core = self.engine.core
        core.inbox.run()
        while core.scheduler.has_work:
            core.step()
            yield


def _keep_ends(
    ended: list[tuple[GenerationRequest, FinishedEvent]],
    request: GenerationRequest,
    events: list[Event],
) -> None:
    ended += [(request, event) for event in events if isinstance(event, FinishedEvent)]
