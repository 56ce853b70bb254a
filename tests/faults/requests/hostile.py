"""Bytes that no client of ours sends: no HTTP/2, no gRPC, or no message; and who sends them."""

from __future__ import annotations

import asyncio
import gzip
import random
import struct
from collections.abc import Mapping

from tests.support.rpc.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST,
    SETTINGS,
    WINDOW,
    called,
    frame,
    header,
    headers,
    opened,
)

BOMB_BYTES = 60 << 20  # as gzip little enough for the first window of a connection
PONG = b"are you?"
_MAX_READ_S = 5.0


def bomb() -> bytes:
    """Return a call whose message is 60 KiB of gzip, and 60 MiB."""
    zeros = gzip.compress(bytes(BOMB_BYTES), 9)
    return called(zeros, b"/tandem.v1.InferenceService/GetModels", b"\1", grpc_encoding=b"gzip")


def _cancelled(stream: int) -> bytes:
    call = frame(HEADERS, END_HEADERS, stream, headers())
    return call + frame(RST, 0, stream, struct.pack(">I", 8))


def raw_connections(rng: random.Random) -> Mapping[str, bytes]:
    """Return what to write to a connection, by what is wrong with it."""
    call = frame(HEADERS, END_HEADERS, 1, headers())
    lone = frame(CONTINUATION, 0, 1, header(b"a", b"b" * 100))
    return {
        "HTTP/1 GET": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        "HTTP/1 POST": b"POST / HTTP/1.1\r\nContent-Length: 999999\r\n\r\nabc",
        "TLS hello": bytes.fromhex("1603010200010001fc0303") + rng.randbytes(400),
        "random": rng.randbytes(2000),
        "zeros": bytes(5000),
        "preface alone": PREFACE,
        "half a preface": PREFACE[:10] + b"\0" * 20,
        "random behind the preface": PREFACE + rng.randbytes(500),
        "frame of 16 MiB": PREFACE + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(1000),
        "random as headers": opened(frame(HEADERS, END_HEADERS, 1, rng.randbytes(100))),
        "message shorter than it says": opened(call, frame(DATA, 1, 1, b"\0\0\0\0\5ab")),
        "message of 4 GiB": opened(call, frame(DATA, 1, 1, b"\0\xff\xff\xff\xffab")),
        "unknown flag": called(b"ab", flag=b"\7"),
        "compressed without encoding": called(b"ab", flag=b"\1"),
        "unknown encoding": called(b"ab", flag=b"\1", grpc_encoding=b"snappy"),
        "damaged gzip": called(b"\x1f\x8b\x08ab", flag=b"\1", grpc_encoding=b"gzip"),
        "no message": opened(frame(HEADERS, END_HEADERS | END_STREAM, 1, headers())),
        "twenty messages": opened(call, frame(DATA, 1, 1, bytes(100))),
        "even stream": opened(frame(HEADERS, END_HEADERS, 2, headers())),
        "data on stream 0": opened(frame(DATA, 0, 0, b"x")),
        "settings of 3 bytes": opened(frame(SETTINGS, 0, 0, b"123")),
        "settings flood": opened(frame(SETTINGS, 0, 0, b"") * 200),
        "ping flood": opened(frame(PING, 0, 0, b"12345678") * 200),
        "reset flood": opened(*(_cancelled(2 * i + 1) for i in range(50))),
        "window overflow": opened(call, frame(WINDOW, 0, 1, b"\x7f\xff\xff\xff") * 3),
        "continuation flood": opened(frame(HEADERS, 0, 1, headers()), lone * 300),
        "no method": opened(frame(HEADERS, 5, 1, header(b":path", b"/x"))),
        "another method": opened(frame(HEADERS, 5, 1, headers(**{":method": b"BREW"}))),
        "path not UTF-8": called(b"", b"/tandem.v1.InferenceService/\xff"),
        "header not UTF-8": called(b"", authorization=b"Bearer \xff\xfe"),
        "header not base64": called(b"", x_bin=b"!!!!"),
        "timeout of no number": called(b"", grpc_timeout=b"soon"),
        "JSON": called(b"{}", content_type=b"application/json"),
        "gzip bomb": bomb(),
    }


async def knock(address: str, data: bytes, until: bytes = PONG) -> bytes:
    """Write bytes and a ping to a connection; return what comes, up to its end or some bytes.

    Raises:
        TimeoutError: the server neither answers nor ends the connection.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received = b""
    try:
        async with asyncio.timeout(_MAX_READ_S):
            writer.write(data + frame(PING, 0, 0, PONG))
            while until not in received and (more := await reader.read(1 << 16)):
                received += more
    except ConnectionError:
        pass  # ended with what we wrote still unread
    finally:
        writer.close()
    return received


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return a message with something wrong in it, or, now and then, nothing."""
    place = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return rng.randbytes(rng.randrange(200))
        case 2:
            return data + rng.randbytes(rng.randrange(1, 20))
        case 3:
            return data[:place] + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + data[place:]
        case 4:
            return data + b"\x0b" * rng.randrange(1, 200)  # groups in groups
        case 5:
            return data * rng.randrange(2, 50)
        case _:
            changed = bytearray(data or b"\0")
            for _ in range(rng.randrange(1, 8)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
