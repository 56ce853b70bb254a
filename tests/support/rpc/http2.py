"""The bytes of HTTP/2 and gRPC, for clients that do what no library does."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/tandem.v1.InferenceService/Generate"
DATA, HEADERS, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def header(name: bytes, value: bytes) -> bytes:
    """Return a header without indexing (RFC 7541, 6.2.2); neither has 127 bytes or more."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def headers(path: bytes = PATH, **more: bytes) -> bytes:
    """Return the headers of a gRPC call; `more` replaces and adds, "_" stands for "-"."""
    pairs = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        **{name.replace("_", "-").encode(): value for name, value in more.items()},
    }
    return b"".join(header(name, value) for name, value in pairs.items())


def opened(*frames: bytes, settings: bytes = b"") -> bytes:
    """Return a connection's first bytes, and then frames."""
    return PREFACE + frame(SETTINGS, 0, 0, settings) + b"".join(frames)


def called(
    message: bytes,
    path: bytes = PATH,
    flag: bytes = b"\0",
    settings: bytes = b"",
    **more: bytes,
) -> bytes:
    """Return a connection with one call of one message, in frames of 16 KiB."""
    data = flag + struct.pack(">I", len(message)) + message
    parts = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    ends = [0] * (len(parts) - 1) + [END_STREAM]
    return opened(
        frame(HEADERS, END_HEADERS, 1, headers(path, **more)),
        *(frame(DATA, end, 1, part) for end, part in zip(ends, parts, strict=True)),
        settings=settings,
    )
