"""The network's rows must fail where a build is broken as they mean it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from socketserver import TCPServer
from typing import Any

import pytest

from serve.app.server import SERVER_OPTIONS
from serve.engine.core import EngineCore
from serve.engine.engine import Engine
from serve.engine.mail import Outbox
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import TokenEvent
from serve.http.server import _HttpServer
from serve.rpc.calls import CallGuard
from serve.rpc.replay import Replays
from tests.faults.callers import r01_cancel, r02_deadline, r05_stalled, r06_partition, r20_idle
from tests.faults.callers.latency import Rounds, Waits
from tests.faults.memory import held, slope
from tests.faults.result import RowResult, Size


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Controls need no more than a few faults."""
    monkeypatch.setitem(r01_cancel.NUM_STREAMS, Size.CI, 60)
    monkeypatch.setitem(r02_deadline.NUM_REQUESTS, Size.CI, 120)
    yield


def test_engine_that_hears_of_no_cancel_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(engine: Engine, request_id: str, reason: Any = None) -> None:
        """Go on."""

    monkeypatch.setattr(Engine, "cancel", deaf)
    result = r01_cancel.run(Size.CI)
    assert any("samples ran when cancelled" in problem for problem in result.problems)


def test_engine_that_hears_late_of_a_cancel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    end_request, step = Scheduler.end_request, EngineCore.step
    told: list[list[Any]] = []  # how many steps are left, to whom, and what

    def hear(scheduler: Scheduler, *arguments: Any, **options: Any) -> None:
        told.append([4, scheduler, partial(end_request, scheduler, *arguments, **options)])

    def step_and_hear(core: EngineCore) -> None:
        step(core)
        for late in [late for late in told if late[1] is core.scheduler]:
            late[0] -= 1
            if late[0] == 0:
                told.remove(late)
                late[2]()

    monkeypatch.setattr(Scheduler, "end_request", hear)
    monkeypatch.setattr(EngineCore, "step", step_and_hear)
    result = r01_cancel.run(Size.CI)
    assert any("samples ran on for more than 2 steps" in problem for problem in result.problems)


def test_dropped_event_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Outbox.add

    def drop(outbox: Outbox, group: Any, event: Any) -> None:
        if not (isinstance(event, TokenEvent) and event.position == 1):
            add(outbox, group, event)

    monkeypatch.setattr(Outbox, "add", drop)
    result = r01_cancel.run(Size.CI)
    assert result.num_lost + result.num_altered > 0


def test_recording_that_is_kept_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    leave = Replays.leave

    async def hoard(replays: Replays, key: Any, recording: Any) -> None:
        kept.append([recording])
        await leave(replays, key, recording)

    monkeypatch.setattr(Replays, "leave", hoard)
    assert any("objects a cancel" in problem for problem in r01_cancel.run(Size.CI).problems)


def test_engine_that_looks_at_deadlines_too_seldom_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    look, num_looks = Scheduler.end_due, 0

    def seldom(scheduler: Scheduler) -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks % 3 == 0:
            look(scheduler)

    monkeypatch.setattr(Scheduler, "end_due", seldom)
    problems = r02_deadline.run(Size.CI).problems
    assert any("passes began behind a deadline" in problem for problem in problems)


def test_server_that_waits_for_stalled_readers_for_ever_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def wait(guard: CallGuard, context: Any, response: Any) -> None:
        await context.write(response)

    monkeypatch.setattr(CallGuard, "write", wait)
    monkeypatch.setattr(r05_stalled, "NUM_READERS", 2)
    monkeypatch.setitem(r05_stalled.ROUNDS, Size.CI, Rounds(1, 1, 5, 50, 100.0))
    monkeypatch.setitem(r05_stalled.MAX_STALL_S, Size.CI, 0.5)
    monkeypatch.setattr(r05_stalled, "SLACK_S", 0.5)
    problems = r05_stalled.run(Size.CI).problems
    assert any("streams still run" in problem for problem in problems)


def test_server_that_asks_too_seldom_keeps_what_is_behind_the_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    slow = dict(SERVER_OPTIONS) | dict.fromkeys(names, 3000)
    monkeypatch.setattr(r06_partition, "options", lambda size: slow)
    monkeypatch.setattr(r06_partition, "limit_s_of", lambda chosen: 0.5)
    monkeypatch.setattr(r06_partition, "SLACK_S", 1.0)
    monkeypatch.setitem(r06_partition.NUM_CLIENTS, Size.CI, 1)
    problems = r06_partition.run(Size.CI).problems
    assert any("not all was freed" in problem for problem in problems)


def test_ratio_is_the_median_over_rounds_and_fails_above_its_bound() -> None:
    waits = Waits(Rounds(3, 3, 60, 99, 1.2), [1.0, 2.0, 1.0], [1.5, 3.0, 9.0])
    result = RowResult("R0", "none")
    waits.judge(result)
    assert waits.is_enough and result.latency_ratio == 1.5
    assert result.problems == ["others' p99 is 1.50 times as long"]


def test_rounds_go_on_while_the_ratio_is_too_high() -> None:
    waits = Waits(Rounds(1, 3, 60, 50, 2.0), [1.0], [3.0])
    assert not waits.is_enough
    waits.alone_s += [1.0, 1.0]
    waits.beside_s += [1.0, 1.0]
    assert waits.is_enough and waits.ratio == 1.0


def test_what_is_kept_is_held() -> None:
    before = held()
    kept = [[number] for number in range(10_000)]
    after = held()
    # Less what the second collection took of others.
    assert after.num_objects - before.num_objects > 0.9 * len(kept)
    assert slope([0, 10, 20, 500, 40]) == 10


def test_metrics_server_that_waits_for_a_stuck_scraper_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_HttpServer, "process_request", TCPServer.process_request)
    monkeypatch.setattr(r20_idle, "NUM_IDLE", 4)
    monkeypatch.setattr(r20_idle, "MAX_SCRAPE_S", 0.5)
    monkeypatch.setitem(r20_idle.ROUNDS, Size.CI, Rounds(1, 1, 5, 50, 100.0))
    assert "a good scrape got no metrics" in r20_idle.run(Size.CI).problems
