"""The load test's journal of calls to a real server, held against the ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import Ledger, check
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient

SAMPLING = pb.SamplingParams(num_samples=3, seed=4, max_tokens=8)
REQUESTS = [
    pb.GenerateRequest(prompt="1 + 1", route=route, sampling=SAMPLING)
    for route in (pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH)
]


@pytest.fixture
def journalled(live: Any, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> Any:
    """Return a function that sends the requests and one Compare, and returns their journal."""

    async def send(path: Path, timeout_s: float | None) -> list[str]:
        compare = pb.CompareRequest(request_id=f"{path.name} c", prompt="2", sampling=SAMPLING)
        async with AsyncClient(live.server.address, max_attempts=1) as client:
            with Journal(path) as journal:
                codes = []
                for number, template in enumerate(REQUESTS):
                    request = pb.GenerateRequest(request_id=f"{path.name} {number}")
                    request.MergeFrom(template)
                    journal.sent(request)
                    codes.append(await journal.follow(request, client.generate(request, timeout_s)))
                journal.sent(compare)
                journal.compared(compare.request_id, await client.compare(compare))
                journal.ended(compare.request_id, "OK")
        return codes

    def run(name: str, timeout_s: float | None = None) -> tuple[list[str], Path]:
        path = tmp_path / name
        return asyncio.run_coroutine_threadsafe(send(path, timeout_s), loop).result(30), path

    return run


def ledger_of(path: Path, reference: Path) -> Ledger:
    return check(read_journal([path]), read_journal([reference]))


def test_calls_of_a_sound_server_are_balanced(journalled: Any) -> None:
    (codes, first), (_, second) = journalled("first"), journalled("second")
    ledger = ledger_of(second, first)
    assert codes == ["OK"] * 3 and ledger.violations == []
    assert (ledger.num_requests, ledger.num_samples, ledger.num_compared) == (4, 18, 18)


def test_failed_calls_are_balanced(journalled: Any) -> None:
    (codes, late), (_, first) = journalled("late", timeout_s=0.0), journalled("first")
    assert codes == ["DEADLINE_EXCEEDED"] * 3
    assert ledger_of(late, first).violations == []


def test_event_that_was_dropped_on_the_way_is_missed(journalled: Any) -> None:
    _, path = journalled("first")
    events = list(read_journal([path]))
    for kind in ("tokens", "sample", "usage", "end"):
        dropped = next(event for event in events if event["event"] == kind)
        assert not check([event for event in events if event is not dropped]).is_balanced, kind
