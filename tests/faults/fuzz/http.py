"""Bytes as a connection to /metrics and /healthz: an answer, or the end of the connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import cache

from prometheus_client import CollectorRegistry

from serve.http.server import _Handler, _HttpServer

# What a status line, our headers and the longest thing that we say of a request take.
MAX_ANSWER_BYTES = 80 << 10


class _Unnamed(_Handler):
    disable_nagle_algorithm = False  # which a pair of sockets has not


def check(data: bytes) -> None:
    """Send the bytes and an end of file; raises where handling them does, or says too much."""
    client, server = socket.socketpair()
    with client, server:
        for end in (client, server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_ANSWER_BYTES)
        client.sendall(data[: 2 * MAX_ANSWER_BYTES])
        client.shutdown(socket.SHUT_WR)
        _Unnamed(server, ("127.0.0.1", 1), _server())
        server.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert len(answer) <= MAX_ANSWER_BYTES, len(answer)
    assert b"Traceback" not in answer, answer


@cache
def _server() -> _HttpServer:
    server = _HttpServer("127.0.0.1", 0, CollectorRegistry(), lambda: True)
    server.server_close()  # nobody is to connect: connections are handed to it
    return server


def seeds() -> Iterator[bytes]:
    """Yield requests, and what is none."""
    for method in (b"GET", b"HEAD", b"POST", b"BREW", b"G\xff"):
        for path in (b"/metrics", b"/healthz?a=1", b"/", b"//x", b"\xff", b"/" + b"x" * 70000):
            yield method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    for version in (
        b"",
        b" HTTP/0.9",
        b" HTTP/2.0",
        b" HTTP/1.\xb2",
        b" HTTP/" + b"9" * 5000 + b".1",
    ):
        yield b"GET /metrics" + version + b"\r\n\r\n"
    for header in (b": x", b"x" * 70000, b"A: b\r\n" * 200, b"A: \xff\0", b"Expect: 100-continue"):
        yield b"GET /healthz HTTP/1.1\r\n" + header + b"\r\n\r\n"
    yield b"GET /healthz HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 3
