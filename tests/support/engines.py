"""An engine that is stepped by hand, what it is asked, and who listens."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from serve.engine.engine import Engine
from serve.engine.sequence import (
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from serve.engine.stats import EngineObserver
from serve.sampling.params import SamplingParams
from tests.support.backends import HistoryBackend

PROMPT = (5, 6, 7)
LONG_PROMPT = tuple(range(10, 35))
_REQUEST_FIELDS = {
    "deadline_s", "make_stop_check", "num_top_logprobs", "cache_salt", "client",
}  # fmt: skip


class EventReader:
    """A sink, and what it was told; reading it checks the order of events.

    It checks late, because the engine logs what a sink raises and goes on.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, events: list[Event]) -> None:
        self.events += events

    @property
    def tokens(self) -> dict[int, list[int]]:
        """Token ids by sample, which must come from position 0 on without a gap."""
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        for event in self.events:
            if isinstance(event, TokenEvent):
                assert event.position == len(tokens[event.index])
                tokens[event.index].append(event.token_id)
        return tokens

    @property
    def endings(self) -> dict[int, FinishedEvent]:
        """Terminal events by sample: one each, the last, with the tokens that were emitted."""
        endings: dict[int, FinishedEvent] = {}
        tokens = self.tokens
        for event in self.events:
            assert event.index not in endings, "an event after the terminal one"
            if isinstance(event, FinishedEvent):
                assert list(event.token_ids) == tokens[event.index]
                assert len(event.logprobs) == len(event.token_ids)
                assert len(event.processed_logprobs) == len(event.token_ids)
                endings[event.index] = event
        return endings

    @property
    def reasons(self) -> list[FinishReason]:
        return [self.endings[index].finish_reason for index in sorted(self.endings)]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        return [self.endings[index].token_ids for index in sorted(self.endings)]


class StoppedClock:
    """Shows `now_s` until it is set."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class CountingObserver(EngineObserver):
    """Adds up what an engine tells of itself."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.reasons: list[FinishReason] = []
        self.phases: list[str] = []
        self.intervals = 0

    def on_step(self, phase: str, batch_size: int, step_s: float, host_s: float) -> None:
        assert 0 <= host_s <= step_s
        self.phases.append(phase)

    def on_prompt(self, num_tokens: int, num_cached: int) -> None:
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def on_tokens(self, num_tokens: int) -> None:
        self.generation_tokens += num_tokens

    def on_token_interval(self, itl_s: float, count: int) -> None:
        self.intervals += count

    def on_finished(self, finish_reason: FinishReason) -> None:
        self.reasons.append(finish_reason)


def make_engine(*, max_num_seqs: int = 4, max_model_len: int = 64, **settings: Any) -> Engine:
    """Return an engine on a `HistoryBackend`, or on `backend`."""
    backend = settings.pop("backend", None)
    backend = backend or HistoryBackend(max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    return Engine(backend, **{"eos_token_ids": frozenset({HistoryBackend.EOS}), **settings})


def backend_of(engine: Engine) -> Any:
    """Return what an engine runs on, to be told what to do."""
    return engine.core.runner.backend


def submit(
    engine: Engine, request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **settings: Any
) -> EventReader:
    """Ask for samples, by fields of the request and of `SamplingParams`."""
    fields = {name: settings.pop(name) for name in _REQUEST_FIELDS & settings.keys()}
    params = SamplingParams(**{"max_tokens": 8, **settings})
    reader = EventReader()
    engine.submit(GenerationRequest(request_id, prompt, params, **fields), reader)
    return reader


def run(engine: Engine, max_steps: int = 2000) -> None:
    """Step until nothing is left; then nothing may be remembered or lost."""
    for _ in range(max_steps):
        engine.core.step()
        assert engine.load().num_unaccounted == 0
        if is_idle(engine):
            assert engine.core.scheduler.is_empty
            return
    raise AssertionError(f"still busy: {engine.load()}")


def is_idle(engine: Engine) -> bool:
    load = engine.load()
    return (load.num_running, load.num_waiting) == (0, 0)
