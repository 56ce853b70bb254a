"""Whose completions are scored next."""

from __future__ import annotations

from typing import Any

from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.scoring import ScoringJob, ScoringRequest
from serve.engine.waiting import ScoringQueue


def make(*clients: str) -> ScoringQueue:
    queue = ScoringQueue()
    for number, client in enumerate(clients):
        request = ScoringRequest(f"{client}{number}", (1,), ((2,),), client=client)
        queue.add(ScoringJob(request))
    return queue


def served(queue: ScoringQueue) -> str:
    order = []
    while (job := queue.first) is not None:
        assert queue.first is job, "the one under way goes on until it is removed"
        queue.remove(job)
        order.append(job.request.request_id)
    assert len(queue) == 0
    return " ".join(order)


def test_clients_alternate_and_each_is_served_in_its_order() -> None:
    assert served(make(*"aaabac")) == "a0 b3 c5 a1 a2 a4"


def test_job_that_is_removed_before_its_turn_costs_its_client_no_turn() -> None:
    queue = make(*"abbac")
    (cancelled,) = queue.of("b1")
    queue.remove(cancelled)
    assert [job.request.request_id for job in queue] == ["a0", "a3", "b2", "c4"]
    assert served(queue) == "a0 b2 c4 a3"


def test_cleared_queue_returns_what_was_in_it() -> None:
    queue = make(*"aba")
    assert [job.request.request_id for job in queue.clear()] == ["a0", "a2", "b1"]
    assert queue.first is None and list(queue) == []


def test_engine_scores_for_clients_in_turns(make_backend: Any) -> None:
    backend = make_backend()
    engine = Engine(backend, eos_token_ids=frozenset({backend.EOS}))
    order: list[str] = []
    for client in "aaab":
        request = ScoringRequest("r", (5, 6, 7), ((8, 9),) * 3, client=client)
        engine.score(request).add_done_callback(lambda done, client=client: order.append(client))
    for _ in OfflineEngine(engine).run():
        pass
    assert "".join(order) == "abaa"
