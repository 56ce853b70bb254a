"""Connections that want nothing, held until the process is killed.

    python -m tests.faults.callers.idle_connections DATA METRICS NUM_IDLE NUM_SCRAPERS

DATA and METRICS are addresses. It says `here` on stdout when all are connected. Half of the idle
ones have sent the preface of HTTP/2. Scrapers send half a request, or a whole one and read nothing;
each comes again after 5 s.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import ExitStack, suppress

Address = tuple[str, int]

_RETURN_S = 5.0
_EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _EMPTY_SETTINGS
_SCRAPES = (b"GET /metrics HTTP/1.0\r\n\r\n", b"GET /metr")


def _connect_idle(address: Address, count: int, stack: ExitStack) -> None:
    for number in range(count):
        idle = stack.enter_context(socket.create_connection(address, timeout=30))
        if number % 2:
            idle.sendall(_PREFACE)


def _scrape_badly(address: Address, count: int, stack: ExitStack) -> None:
    for number in range(count):
        with suppress(OSError):  # thrown out already, as it should be
            scraper = stack.enter_context(socket.socket())
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            scraper.settimeout(5)
            scraper.connect(address)
            scraper.sendall(_SCRAPES[number % 2])


def _parse(address: str) -> Address:
    host, _, port = address.rpartition(":")
    return host, int(port)


def main(data: str, metrics: str, num_idle: int, num_scrapers: int) -> None:
    """Connect, say so, and come again for ever."""
    with ExitStack() as stack:
        _connect_idle(_parse(data), num_idle, stack)
        is_new = True
        while True:
            with ExitStack() as scrapers:
                _scrape_badly(_parse(metrics), num_scrapers, scrapers)
                if is_new:
                    print("here", flush=True)
                    is_new = False
                time.sleep(_RETURN_S)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
