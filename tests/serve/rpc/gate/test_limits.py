"""The gate over real channels: how much may run at a time, and that counts return."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serve.client import retry_delay_s
from serve.rpc.credentials.tokens import TokenFile
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure
from tests.support.rpc.gated import CODE, KINDS


def test_requests_of_a_stream_count_as_calls(gated: Any) -> None:
    requests: queue.Queue[bytes | None] = queue.Queue()
    with gated(max_concurrent=2) as it:
        stream = it.channel.stream_stream("/test.Echo/Slotted")(iter(requests.get, None))
        wait_until(lambda: it.gate.num_active == 1)
        requests.put(b"x")  # ends before the next one comes: they have the slot of the call
        assert next(stream) == b"x of "
        requests.put(b"wait")
        wait_until(lambda: it.echo.num_waiting == 1)
        assert it.gate.num_active == 1
        requests.put(b"wait")
        wait_until(lambda: it.echo.num_waiting == it.gate.num_active == 2)
        assert it.refusal("UnaryUnary").code() is CODE.RESOURCE_EXHAUSTED
        requests.put(b"x")
        assert next(stream) == b"2 calls of this client run, which is the limit"
        assert it.gate.num_active == 2
        assert it.rejected == ["peer_limit"]  # of the call alone: the handler tells of requests
        stream.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        requests.put(None)
        with it.waiting(2):
            assert it.gate.num_active == 2


def test_slots_that_requests_leave_are_those_of_the_next(gated: Any) -> None:
    with gated(max_concurrent=1) as it:
        requests = it.channel.stream_stream("/test.Echo/Slotted")
        for _ in range(3):
            assert list(requests(iter([b"x"]), timeout=10)) == [b"x of "]
            wait_until(lambda: it.gate.num_active == 0)


def test_calls_above_the_limit_are_told_when_to_come_again(gated: Any) -> None:
    with gated(max_concurrent=2) as it:
        with it.waiting(2):
            assert it.gate.num_active == 2
            error = it.refusal("UnaryUnary")
            assert it.gate.num_active == 2
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert retry_delay_s(error) == 1
        assert it.rejected == ["peer_limit"]
        wait_until(lambda: it.gate.num_active == 0)
        assert it.result("UnaryUnary") == b"x of "


def test_limit_is_per_client_not_per_connection(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=1, tokens=tokens) as it, it.waiting(1, token="ada"):
        assert it.refusal("UnaryUnary", token="ada").code() is CODE.RESOURCE_EXHAUSTED
        with it.waiting(1, token="bob"):
            assert it.gate.num_active == 2


def test_calls_whose_message_does_not_come_count_too(gated: Any) -> None:
    may_send = threading.Event()

    def late() -> Iterator[bytes]:
        may_send.wait(10)
        yield b"late"

    with gated(max_concurrent=1) as it:
        call = it.channel.stream_stream("/test.Echo/UnaryUnary")(late(), timeout=10)
        wait_until(lambda: it.gate.num_active == 1)
        assert it.refusal("UnaryUnary").code() is CODE.RESOURCE_EXHAUSTED
        may_send.set()
        assert list(call) == [b"late of "]


def test_message_that_never_comes_ends_the_call(
    gated: Any, unsent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.rpc.gate.MAX_READ_S", 0.01)
    with gated() as it:
        call = it.channel.stream_stream("/test.Echo/UnaryUnary")(unsent())
        error = failure(lambda: next(call))
        assert error.code() is CODE.DEADLINE_EXCEEDED
        assert error.details() == "no message came within 0.01 s"
        wait_until(lambda: it.gate.num_active == 0)
        assert (it.ended, it.rejected) == ([("UnaryUnary", CODE.DEADLINE_EXCEEDED)], [])


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
def test_call_without_a_message_is_an_invalid_argument(gated: Any, kind: str) -> None:
    with gated() as it:
        call = it.channel.stream_stream(f"/test.Echo/{kind}")(iter(()), timeout=10)
        assert failure(lambda: next(call)).code() is CODE.INVALID_ARGUMENT
        wait_until(lambda: it.gate.num_active == 0)
        assert (it.ended, it.rejected) == ([(kind, CODE.INVALID_ARGUMENT)], [])


def test_too_large_message_does_not_come_to_the_gate(gated: Any) -> None:
    with gated() as it:
        error = it.refusal("UnaryUnary", bytes(5 << 20))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        wait_until(lambda: it.gate.num_active == 0)
        assert it.ended == it.rejected == []


@pytest.mark.parametrize("kind", [*KINDS, "Written"])
def test_count_returns_however_a_call_ends(
    gated: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with gated(max_concurrent=1) as it:
        for data, code in ((b"fail", CODE.UNKNOWN), (b"abort", CODE.NOT_FOUND)):
            assert it.refusal(kind, data).code() is code
            wait_until(lambda: it.gate.num_active == 0)
        error = it.refusal(kind, b"wait", timeout=0.05)
        assert error.code() is CODE.DEADLINE_EXCEEDED
        wait_until(lambda: it.gate.num_active == 0)
        call = it.call(kind, b"wait")
        wait_until(lambda: it.gate.num_active == 1)
        call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        assert it.result(kind).startswith(b"x of ")
    assert "suppressed" not in caplog.text


def test_cancel_while_the_message_is_read_leaves_no_trace(
    gated: Any, unsent: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with gated() as it:
        for _ in range(50):
            call = it.channel.stream_stream("/test.Echo/UnaryUnary")(unsent(), timeout=10)
            wait_until(lambda: it.gate.num_active == 1)
            call.cancel()
            wait_until(lambda: it.gate.num_active == 0)
        assert it.result("UnaryUnary") == b"x of "
        assert it.ended == []
    assert caplog.records == []


def test_generator_that_its_reader_left_is_closed_before_the_count_returns(gated: Any) -> None:
    with gated() as it:
        it.echo.padding_bytes = 1 << 20  # more than goes out before the client reads
        call = it.call("UnaryStream", b"flood")
        wait_until(lambda: it.echo.num_yielded > 0)
        call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        assert it.echo.is_closed


def test_storm_of_refusals_and_cancels_leaves_no_count(gated: Any, tokens: TokenFile) -> None:
    with gated(max_concurrent=5, tokens=tokens) as it:
        calls = [
            it.call(KINDS[i % 4], b"wait" if i % 3 else b"x", token=("ada", "bob", "eve")[i % 3])
            for i in range(300)
        ]
        for call in calls:
            call.cancel()
        wait_until(lambda: it.gate.num_active == 0)
        with it.waiting(5, token="ada"), it.waiting(5, token="bob"):
            assert it.gate.num_active == 10


def test_end_waits_for_calls_that_run_and_for_none_that_come_later(
    gated: Any, loop: asyncio.AbstractEventLoop
) -> None:
    with gated() as it:
        earlier = it.call("UnaryUnary", b"wait")
        wait_until(lambda: it.echo.num_waiting == 1)
        ending = asyncio.run_coroutine_threadsafe(it.gate.wait_for_current(30), loop)
        with it.waiting(1):
            wait_until(lambda: it.gate.num_active == 2)
            assert not ending.done()
            earlier.cancel()
            ending.result(10)
            assert it.gate.num_active == 1


def test_end_waits_no_longer_than_it_is_told(gated: Any, loop: asyncio.AbstractEventLoop) -> None:
    with gated() as it, it.waiting(1):
        asyncio.run_coroutine_threadsafe(it.gate.wait_for_current(0.05), loop).result(10)
        assert it.gate.num_active == 1


def test_calls_that_are_held_run_when_they_are_released(
    gated: Any, loop: asyncio.AbstractEventLoop
) -> None:
    with gated() as it, it.waiting(1):  # one that runs already goes on
        loop.call_soon_threadsafe(it.gate.hold)
        calls = [it.call("Open", b"x") for _ in range(3)]
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(10)
        assert not any(call.done() for call in calls) and it.gate.num_active == 1
        assert it.result("Health") == b"x of "
        loop.call_soon_threadsafe(it.gate.release)
        assert [b"".join(call) for call in calls] == 3 * [b"x of "]
