"""What gRPC logs of bad clients: bounded, whoever sends it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serve.app.grpc_log import LOGGER, OncePerSecond, quiet_grpc, quiet_grpc_tracebacks

# Headers that the core cannot parse, three of them, to a server that started as ours does.
SERVER = """
import asyncio, socket, sys
from serve.app.grpc_log import quiet_grpc
quiet_grpc()
assert "grpc" not in sys.modules
import grpc
from tests.support.rpc.http2 import END_HEADERS, END_STREAM, HEADERS, PING, frame, headers, opened

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(opened())
    for stream in (1, 3, 5):
        block = headers(grpc_timeout=b"xxx")
        writer.write(frame(HEADERS, END_STREAM | END_HEADERS, stream, block))
    writer.write(frame(PING, 0, 0, b"12345678"))
    seen = b""
    while b"12345678" not in seen:
        seen += await reader.read(4096)
    print("answered")
    writer.close()
    await server.stop(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("verbosity", [None, "ERROR"])
def test_core_says_nothing_about_bad_headers_unless_it_is_asked_to(verbosity: str | None) -> None:
    chosen = {"GRPC_VERBOSITY": verbosity} if verbosity else {}
    inherited = {name: text for name, text in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        env=inherited | chosen,
    )
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr
    assert bool(done.stderr) is bool(verbosity), done.stderr


def test_one_record_a_second_says_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    times_s = iter((0.0, 0.0, 0.1, 0.2, 1.5, 3.0))  # the first is that of its making
    logger = logging.getLogger("tests.once")
    logger.addFilter(once := OncePerSecond(lambda: next(times_s)))
    for _ in range(5):
        logger.error("bad %s", "header")
    logger.removeFilter(once)
    texts = [record.getMessage() for record in caplog.records]
    assert texts == ["bad header", "bad header (2 more were not logged)", "bad header"]


def test_a_chosen_verbosity_stays_and_there_is_one_filter() -> None:
    logger = logging.getLogger(LOGGER)
    before = list(logger.filters)
    environ = {"GRPC_VERBOSITY": "DEBUG"}
    quiet_grpc(environ)
    quiet_grpc(environ)
    assert environ == {"GRPC_VERBOSITY": "DEBUG"}
    assert sum(isinstance(found, OncePerSecond) for found in logger.filters) == 1
    logger.filters[:] = before


def test_traceback_that_grpc_would_print_is_logged(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cygrpc, "traceback", cygrpc.traceback)
    monkeypatch.setattr(logging.getLogger(LOGGER), "filters", [])
    quiet_grpc_tracebacks()
    try:
        raise ValueError("sent to nobody")
    except ValueError:
        cygrpc.traceback.print_exc()
    assert "could not tell a client" in caplog.text and "sent to nobody" in caplog.text
    assert cygrpc.traceback.format_exc is traceback.format_exc
    assert capsys.readouterr().err == ""
