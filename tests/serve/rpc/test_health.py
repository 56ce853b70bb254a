"""Health of a server: what probes and watchers are told, whoever else watches and however badly."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.tandem.v1 import inference_pb2 as pb
from serve.pair.served import Role
from serve.rpc.health import MAX_NAME_BYTES, Health
from tests.support.polling import wait_until
from tests.support.rpc.http2 import DATA, HEADERS, called

UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Site:
    """A server of health alone."""

    def __init__(self, health: Health, stub: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.health = health
        self.stub = stub
        self.loop = loop

    def watch(self, name: str) -> Any:
        return self.stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20)

    def check(self, name: str) -> int:
        return int(self.stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status)

    def set(self, name: str, is_serving: bool) -> None:
        self.loop.call_soon_threadsafe(self.health.set, name, is_serving)

    def wait_for_watchers(self, number: int) -> None:
        wait_until(lambda: self.health.num_watchers == number)


@pytest.fixture
def site(loop: asyncio.AbstractEventLoop) -> Iterator[Site]:
    async def start() -> tuple[Health, grpc.aio.Server, int]:
        health, server = Health(max_watchers=2), grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return health, server, port

    health, server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Site(health, health_pb2_grpc.HealthStub(channel), loop)
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code()


def test_one_watcher_leaves_and_the_other_sees_the_change(site: Site) -> None:
    site.set("a", True)
    leaving, staying = site.watch("a"), site.watch("a")
    assert (next(leaving).status, next(staying).status) == (SERVING, SERVING)
    leaving.cancel()
    site.wait_for_watchers(1)
    site.set("a", False)
    assert next(staying).status == NOT_SERVING
    staying.cancel()


def test_watcher_is_told_changes_of_its_name_alone(site: Site) -> None:
    for name in "ab":
        site.set(name, True)
    watched = site.watch("a")
    assert next(watched).status == SERVING
    site.set("a", True)
    site.set("b", False)
    site.set("a", False)
    assert next(watched).status == NOT_SERVING
    watched.cancel()


def test_unknown_name_is_watched_until_it_is_known(site: Site) -> None:
    watched = site.watch("later")
    assert next(watched).status == UNKNOWN
    site.set("later", True)
    assert next(watched).status == SERVING
    watched.cancel()


def test_probe_of_an_unknown_name_is_not_found(site: Site) -> None:
    site.set("", True)
    assert site.check("") == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        site.check("nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watchers_are_bounded_and_probes_are_not(site: Site) -> None:
    site.set("a", True)
    watchers = [site.watch("a") for _ in range(2)]
    for watched in watchers:
        next(watched)
    assert code_of(site.watch("a")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert site.check("a") == SERVING
    for watched in watchers:
        watched.cancel()
    site.wait_for_watchers(0)
    again = site.watch("a")
    assert next(again).status == SERVING
    again.cancel()


def test_watcher_keeps_no_long_name_in_memory(site: Site) -> None:
    watched = site.watch("x" * MAX_NAME_BYTES)
    assert next(watched).status == UNKNOWN
    watched.cancel()
    assert code_of(site.watch("é" * MAX_NAME_BYTES)) is grpc.StatusCode.INVALID_ARGUMENT


def test_closing_says_not_serving_and_ends_the_watches(site: Site) -> None:
    site.set("a", True)
    watched, unknown = site.watch("a"), site.watch("b")
    assert (next(watched).status, next(unknown).status) == (SERVING, UNKNOWN)
    site.loop.call_soon_threadsafe(site.health.close)
    assert next(watched).status == NOT_SERVING
    assert {code_of(watched), code_of(unknown)} == {grpc.StatusCode.UNAVAILABLE}
    assert site.check("a") == NOT_SERVING
    site.set("a", True)
    late = site.watch("a")
    assert next(late).status == NOT_SERVING
    assert code_of(late) is grpc.StatusCode.UNAVAILABLE


# A whole server


def test_watchers_see_the_drain_and_then_their_calls_end(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(), drain_delay_s=0.1) as live:
        stub = health_pb2_grpc.HealthStub(live.channel)
        request = health_pb2.HealthCheckRequest(service="readiness")
        leaving, staying = stub.Watch(request, timeout=20), stub.Watch(request, timeout=20)
        assert (next(leaving).status, next(staying).status) == (SERVING, SERVING)
        leaving.cancel()
        stopping = live.stop_soon()
        assert next(staying).status == NOT_SERVING
        assert not stopping.done()
        assert code_of(staying) is grpc.StatusCode.UNAVAILABLE
        stopping.result(10)


def test_watchers_that_never_read_do_not_hold_up_the_end(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live, watching_without_reading(live.server.address, 3):
        live.stop_soon().result(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_watchers_that_never_read_hold_up_no_other(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live, watching_without_reading(live.server.address, 3):
        stub = health_pb2_grpc.HealthStub(live.channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=20)
        assert next(watched).status == SERVING
        live.pair.backends[Role.STUDENT].error = SystemExit()
        with pytest.raises(grpc.RpcError):
            live.client.score(pb.ScoreRequest(prompt="x", completions=[{"text": "y"}]))
        assert next(watched).status == NOT_SERVING
        watched.cancel()


_INITIAL_WINDOW_SIZE = 4


@contextmanager
def watching_without_reading(address: str, num_watchers: int) -> Iterator[None]:
    """Have clients watch readiness whose flow control lets not one byte of data through."""
    host, _, port = address.rpartition(":")
    sockets = [socket.create_connection((host, int(port)), timeout=10) for _ in range(num_watchers)]
    try:
        for each in sockets:
            each.sendall(_watch_request("readiness"))
            with closing(each.makefile("rb")) as received:
                _wait_for_headers(received)
        yield
    finally:
        for each in sockets:
            each.close()


def _watch_request(name: str) -> bytes:
    message = health_pb2.HealthCheckRequest(service=name).SerializeToString()
    no_window = struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)
    return called(message, b"/grpc.health.v1.Health/Watch", settings=no_window)


def _wait_for_headers(received: Any) -> None:
    """Return when the response has begun: its first message waits for the window."""
    kind = None
    while kind != HEADERS:
        header = received.read(9)
        assert len(header) == 9, "the server hung up"
        kind = header[3]
        assert kind != DATA
        received.read(int.from_bytes(header[:3], "big"))
