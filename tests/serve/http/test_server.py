"""The HTTP server answers probes and scrapes, whoever else is connected."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.http.server import MAX_CONNECTIONS, MetricsServer
from tests.support.polling import wait_until

HOST = "127.0.0.1"


class Site:
    """A server of one gauge, and ways to talk to it."""

    def __init__(self, host: str = HOST) -> None:
        self.registry = CollectorRegistry()
        self.gauge = Gauge("load", "Of a test.", registry=self.registry)
        self.is_healthy = True
        self.server = MetricsServer(self.registry, lambda: self.is_healthy, host, 0)
        self.host = host
        self.port = int(self.server.url.rpartition(":")[2].partition("/")[0])

    def ask(self, method: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    site.server.start()
    yield site
    site.server.stop()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("GET", "/metrics?name=load", 200),
        ("GET", "/healthz", 200),
        ("HEAD", "/metrics", 200),
        ("HEAD", "/nothing", 404),
        ("GET", "/", 200),
        ("GET", "/metrics/", 200),
        ("GET", "/metrics/x", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/healthz", 405),
        ("BREW", "/metrics", 501),
    ],
)
def test_status_follows_method_and_path(site: Site, method: str, path: str, status: int) -> None:
    response, body = site.ask(method, path)
    assert response.status == status
    assert (response.headers["Allow"] == "GET, HEAD") == (status == 405)
    assert "Python" not in response.headers["Server"]
    assert (body == b"") == (method == "HEAD")


def test_head_is_the_headers_of_get_alone(site: Site) -> None:
    """Over a raw socket: an HTTP client would not look for a body."""
    head, get = (exchange(site, f"{method} /metrics HTTP/1.0") for method in ("HEAD", "GET"))
    (head_lines, head_body), (get_lines, get_body) = (
        text.split("\r\n\r\n") for text in (head, get)
    )
    assert [line.partition(":")[0] for line in head_lines.splitlines()] == [
        line.partition(":")[0] for line in get_lines.splitlines()
    ]
    assert head_body == "" and f"Content-Length: {len(get_body)}" in get_lines
    assert "Content-Type: text/plain; version=0.0.4" in get_lines


def exchange(site: Site, request: str) -> str:
    with site.connect() as connection:
        connection.sendall(f"{request}\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def test_every_scrape_reads_anew(site: Site) -> None:
    for value in (1, 2):
        site.gauge.set(value)
        assert f"load {value}.0\n".encode() in site.ask("GET", "/metrics")[1]


@pytest.mark.parametrize("path", ["/healthz", "/healthz/", "/health", "/health?verbose=1"])
def test_health_follows_the_server(site: Site, path: str) -> None:
    assert site.ask("GET", path)[0].status == 200
    site.is_healthy = False
    assert site.ask("GET", path)[0].status == 503


@pytest.mark.parametrize("path", ["/", "/nothing"])
def test_index_says_what_there_is(site: Site, path: str) -> None:
    assert {b"/metrics", b"/healthz", b"/health"} < set(site.ask("GET", path)[1].split())


def test_ipv6_is_listened_on() -> None:
    try:
        site = Site("::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    site.server.start()
    try:
        assert site.server.url == f"http://[::1]:{site.port}/metrics"
        assert site.ask("GET", "/metrics")[0].status == 200
    finally:
        site.server.stop()


def test_port_that_is_taken_is_refused(site: Site) -> None:
    with pytest.raises(OSError):
        MetricsServer(site.registry, lambda: True, HOST, site.port)


def test_server_that_never_started_stops() -> None:
    Site().server.stop()


def num_handlers() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_idle_connections_keep_nobody_out_and_have_a_bound(site: Site) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(site.connect()) for _ in range(3 * MAX_CONNECTIONS)]
        assert site.ask("GET", "/metrics")[0].status == 200
        wait_until(lambda: num_handlers() <= MAX_CONNECTIONS)
        assert idle[0].recv(1) == b"", "the oldest is closed"
        idle[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(12) == b"HTTP/1.0 200", "the newest is served"


def test_reader_that_stops_reading_delays_no_other(site: Site) -> None:
    """More text than the kernel buffers: the stuck scrapes' threads hang in their writes."""
    big = Gauge("big", "x" * 1000, ["i"], registry=site.registry)
    for i in range(10_000):
        big.labels(f"{i:0900d}")
    with ExitStack() as stack:
        for _ in range(4):
            stuck = stack.enter_context(site.connect())
            stuck.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        wait_until(lambda: num_handlers() == 4)
        response, body = site.ask("GET", "/metrics")
        assert response.status == 200 and len(body) > 9_000_000
        # That one's own thread ends a moment behind its answer; the others are stuck still.
        wait_until(lambda: num_handlers() == 4)


def test_silent_connection_is_closed_in_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("serve.http.server.TIMEOUT_S", 0.05)
    with site.connect() as silent:
        assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_scraper_that_hangs_up_is_not_news(
    site: Site, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with site.connect() as rude:
        # Closing sends a reset: the answer meets a connection that is no more.
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        rude.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    wait_until(lambda: num_handlers() == 0)
    assert site.ask("GET", "/metrics")[0].status == 200
    assert not caplog.records and capfd.readouterr().err == ""


class Broken(Collector):
    def collect(self) -> list[Metric]:
        raise ValueError("a bug")


def test_collector_that_fails_is_logged_and_ends_one_scrape(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    site.registry.register(broken)
    with pytest.raises(http.client.RemoteDisconnected):
        site.ask("GET", "/metrics")
    wait_until(lambda: bool(caplog.records))
    assert caplog.records[0].levelno == logging.ERROR
    site.registry.unregister(broken)
    assert site.ask("GET", "/metrics")[0].status == 200
