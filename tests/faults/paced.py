"""A model with known answers that takes its time, as real ones do, and keeps count of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from serve.engine.engine import Engine
from serve.engine.scoring import ScoredCompletion, ScoringRequest
from serve.engine.sequence import Event, EventSink, FinishedEvent, FinishReason, GenerationRequest
from tests.support.backends import HistoryBackend, Pass

OnEnd = Callable[[GenerationRequest, FinishReason], None]
OnTaken = Callable[[GenerationRequest | ScoringRequest], None]


class PacedBackend(HistoryBackend):
    """Passes take `pass_s` more, in which the interpreter is free.

    Before one `on_pass` gets the tokens of each of its rows, behind it `on_passed` is called.
    """

    pass_s = 0.003
    on_pass: Callable[[list[list[int]]], None] = staticmethod(lambda rows: None)
    on_passed: Callable[[], None] = staticmethod(lambda: None)

    def before_pass(self, first_row: int, rows: Pass) -> None:
        self.on_pass(
            [self.rows[row][:past] + list(ids) for row, (past, ids) in enumerate(rows, first_row)]
        )
        time.sleep(self.pass_s)

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        logits = super().forward(first_row, new_token_ids, past_lengths, logit_indices)
        self.calls.clear()  # or memory grows with every pass
        self.on_passed()
        return logits


class EngineWatch:
    """Counts an engine's steps, and tells of what it takes and how samples of requests end."""

    def __init__(
        self, engine: Engine, on_end: OnEnd, on_taken: OnTaken = lambda request: None
    ) -> None:
        self.num_steps = 0
        self._step, self._submit, self._score = engine.step, engine.submit, engine.score
        self._on_end, self._on_taken = on_end, on_taken
        engine.step = self._watched_step  # type: ignore[method-assign]
        engine.submit = self._watched_submit  # type: ignore[method-assign]
        engine.score = self._watched_score  # type: ignore[method-assign]

    def _watched_step(self) -> None:
        self.num_steps += 1
        self._step()

    def _watched_submit(self, request: GenerationRequest, sink: EventSink) -> None:
        def tapped(events: list[Event]) -> None:
            for event in events:
                if isinstance(event, FinishedEvent):
                    self._on_end(request, event.finish_reason)
            sink(events)

        self._on_taken(request)
        self._submit(request, tapped)

    def _watched_score(self, request: ScoringRequest) -> Future[list[ScoredCompletion]]:
        self._on_taken(request)
        return self._score(request)
