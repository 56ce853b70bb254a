"""The ledger, first tokens and wasted tokens of engines that are stepped by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from serve.engine.engine import Engine
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import Event, FinishedEvent, GenerationRequest
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Role, ServedModel
from serve.sampling.params import SamplingParams


class Clock:
    """Every look at it is a second later, or `tick_s`."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.tick_s = 1.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


class Stepped:
    """An engine that works when it is told to, watched by metrics of its own."""

    def __init__(self, backend: Any, **settings: Any) -> None:
        self.metrics = ServerMetrics(CollectorRegistry())
        self.clock = Clock()
        self.backend = backend
        self.engine = Engine(
            backend,
            eos_token_ids=frozenset({backend.EOS}),
            observer=self.metrics.observer(Role.STUDENT),
            clock=self.clock,
            **settings,
        )
        self.metrics.watch(ServedModel(Role.STUDENT, self.engine, tokenizer=None))  # type: ignore[arg-type]
        self.endings: list[FinishedEvent] = []

    def submit(self, request_id: str, *, deadline_s: float | None = None, **params: Any) -> None:
        sampling = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **params})
        request = GenerationRequest(request_id, (5, 6, 7), sampling, deadline_s=deadline_s)
        self.engine.submit(request, self._read)

    def _read(self, events: list[Event]) -> None:
        self.endings += [event for event in events if isinstance(event, FinishedEvent)]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.step()

    @property
    def is_idle(self) -> bool:
        load = self.engine.load()
        return load.num_running == load.num_waiting == 0

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"tandem_{name}", labels)
        assert value is not None
        return value

    @property
    def imbalance(self) -> float:
        return self.value("ledger_imbalance")


@pytest.fixture
def stepped(make_backend: Any) -> Stepped:
    return Stepped(make_backend(max_num_seqs=3), max_waiting=1000)


def test_ledger_is_balanced_through_submits_cancels_deadlines_and_failures(
    stepped: Stepped,
) -> None:
    chance = random.Random(0)
    num_samples = 0
    for number in range(60):
        count, request_id = chance.randint(1, 5), str(number)
        late_s = stepped.clock.now_s + chance.randint(1, 60) if chance.random() < 0.3 else None
        stepped.submit(request_id, deadline_s=late_s, num_samples=count)
        num_samples += count
        if chance.random() < 0.3:
            request = ScoringRequest(request_id, (5, 6), ((7, 8),), deadline_s=late_s)
            stepped.engine.score(request)
        if chance.random() < 0.3:
            stepped.engine.cancel(str(chance.randint(0, number)))
        stepped.backend.error = RuntimeError("injected") if chance.random() < 0.1 else None
        for _ in range(chance.randint(0, 3)):
            stepped.step()
            assert stepped.imbalance == 0
    stepped.backend.error = None
    while not stepped.is_idle:
        stepped.step()
        assert stepped.imbalance == 0
    assert len(stepped.endings) == num_samples
    assert len({event.finish_reason for event in stepped.endings}) == 4


def test_ledger_is_balanced_at_every_scrape_while_a_thread_works(stepped: Stepped) -> None:
    stepped.engine.start()
    try:
        for number in range(100):
            stepped.submit(str(number), num_samples=3)
            if number % 3 == 0:
                stepped.engine.cancel(str(number))
            assert stepped.imbalance == 0
    finally:
        stepped.engine.stop()
    assert stepped.imbalance == 0 and len(stepped.endings) == 300


def test_time_to_first_token_is_one_per_request_however_many_samples_wait(
    make_backend: Any,
) -> None:
    """Of 64 samples 48 wait for a row: as 48 late first tokens they would page somebody."""
    stepped, seconds = Stepped(make_backend(max_num_seqs=16)), itertools.count()
    stepped.clock.now_s = stepped.clock.tick_s = 0.0
    for _ in range(2):
        stepped.submit("r", num_samples=64)
    while not stepped.is_idle:
        now_s = next(seconds) / 10
        stepped.clock.now_s = now_s
        stepped.step()
    assert now_s > 10, "the last samples had to wait"
    for name in ("time_to_first_token", "request_queue"):
        assert stepped.value(f"{name}_seconds_count", role="student") == 2
        assert stepped.value(f"{name}_seconds_bucket", role="student", le="0.5") == 2


def test_sequence_that_the_scheduler_loses_shows_in_the_ledger(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = stepped.engine.core.scheduler.rows.waiting
    add = waiting.add
    monkeypatch.setattr(waiting, "add", lambda sequences: add(list(sequences)[1:]))
    stepped.submit("r", num_samples=3, max_tokens=2)
    stepped.step(10)
    assert len(stepped.endings) == 2 and stepped.imbalance == 1


def test_scoring_that_is_lost_shows_in_the_ledger(stepped: Stepped) -> None:
    stepped.engine.score(ScoringRequest("r", (5, 6), ((7, 8),)))
    stepped.engine.core.inbox.run()
    stepped.engine.core.scheduler.scoring.clear()
    stepped.step()
    assert stepped.imbalance == 1


def test_sequence_that_is_lost_in_a_failure_shows_in_the_ledger_at_once(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped.submit("r", num_samples=3)
    stepped.step(2)
    rows = stepped.engine.core.scheduler.rows
    clear = rows.clear
    monkeypatch.setattr(rows, "clear", lambda: clear()[1:])
    fail(stepped)
    stepped.step()
    assert len(stepped.endings) == 2 and stepped.imbalance == 1


def fail(stepped: Stepped) -> None:
    stepped.backend.error = RuntimeError("injected")


ENDS: dict[str, Callable[[Stepped], None]] = {
    "cancelled": lambda stepped: stepped.engine.cancel("r"),
    "deadline": lambda stepped: setattr(stepped.clock, "now_s", 1000.0),
    "error": fail,
    "shutdown": lambda stepped: stepped.engine.stop(),
}


@pytest.mark.parametrize("reason", ENDS)
def test_tokens_of_a_sample_that_ends_early_are_wasted(stepped: Stepped, reason: str) -> None:
    stepped.submit("r", deadline_s=900.0, num_samples=2)
    stepped.step(4)
    ENDS[reason](stepped)
    stepped.step()
    num_tokens = sum(len(event.token_ids) for event in stepped.endings)
    assert [event.finish_reason.value for event in stepped.endings] == [reason] * 2
    assert num_tokens > 0
    for other in ENDS:
        wasted = stepped.value("wasted_tokens_total", role="student", reason=other)
        assert wasted == (num_tokens if other == reason else 0)


def test_tokens_of_a_complete_sample_are_not_wasted(stepped: Stepped) -> None:
    stepped.submit("r", max_tokens=3)
    stepped.step(5)
    assert stepped.value("generation_tokens_total", role="student") == 3
    for reason in ENDS:
        assert stepped.value("wasted_tokens_total", role="student", reason=reason) == 0
