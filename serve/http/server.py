"""`/metrics` and `/healthz` over HTTP, for Prometheus and for probes; `/health` is the same.

One thread per connection, and a bounded number of them: when one more comes, the oldest is closed.
A scrape takes milliseconds, so the oldest is one that is stuck, and it never keeps a good one out.
Nothing is compressed: that would take time from the models to save it on the loopback.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Lock, Thread
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serve.addresses import join_port

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
# Of one read, and of sending a whole answer.
TIMEOUT_S = 10.0
# How often the HTTP thread looks whether it shall stop.
_POLL_S = 0.1

_INDEX = b"""Tandem's metrics. The models are served over gRPC, on another port.

/metrics  for Prometheus
/healthz  200 while the server is healthy, else 503; /health is the same
"""

Address = tuple[Any, ...]


class MetricsServer:
    """`/metrics` (text format) and `/healthz` (200 while healthy, else 503), by GET and HEAD."""

    def __init__(
        self, registry: CollectorRegistry, is_healthy: Callable[[], bool], host: str, port: int
    ) -> None:
        """Listen; OSError when the port is taken. Port 0 picks a free one."""
        self._server = _HttpServer(host, port, registry, is_healthy)
        self._thread = Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self.url = f"http://{join_port(host, self._server.server_address[1])}/metrics"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; connections that are open end by themselves."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _HttpServer(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, is_healthy: Callable[[], bool]
    ) -> None:
        self._registry = registry
        self._is_healthy = is_healthy
        self._rendering = Lock()
        self._connections: dict[socket.socket, None] = {}  # the oldest first
        self._connections_lock = Lock()
        self.address_family, address = _resolve(host, port)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                self._evict(next(iter(self._connections)))
            self._connections[request] = None
        super().process_request(request, client_address)

    def _evict(self, connection: socket.socket) -> None:
        """Wake the connection's thread with an end of file; it closes what it has."""
        del self._connections[connection]
        with suppress(OSError):  # the peer was faster
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        # Before it is closed: an eviction must never meet a descriptor that is another's by now.
        with self._connections_lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what is our fault; a scraper that went away or reads nothing is no news."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("a scrape failed")

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Return status, content type and body."""
        match path.partition("?")[0].rstrip("/"):
            case "":
                return HTTPStatus.OK, "text/plain", _INDEX
            case "/metrics":
                # One at a time: many impatient scrapers get no more of the interpreter than one.
                with self._rendering:
                    text = generate_latest(self._registry)
                return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, text
            case "/healthz" | "/health" if self._is_healthy():
                return HTTPStatus.OK, "text/plain", b"ok\n"
            case "/healthz" | "/health":
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"not serving\n"
        return HTTPStatus.NOT_FOUND, "text/plain", _INDEX


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection ends with its answer."""

    server: _HttpServer
    disable_nagle_algorithm = True  # the body is not to wait until the header is acknowledged
    server_version = "tandem"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(TIMEOUT_S)

    def do_GET(self) -> None:
        self._send(*self.server.answer(self.path))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET or HEAD\n", Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _send(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    """Return the family and address to bind; socket.gaierror (an OSError) for an unknown host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, address
