"""Clients vanish behind a network partition: all is freed within keepalive and ping timeout.

Streams of several connections run, or wait in the queue, when no packet gets through any more; no
end of a connection is ever seen. The published run has the server's own options (30 s + 10 s), the
tests' run shorter ones. Steps take 20 ms, answers longer than anybody waits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from serve.app import server as server_module
from serve.app.server import SERVER_OPTIONS
from tests.faults.callers.latency import NUM_TEMPLATES, bystanders
from tests.faults.callers.partition import Namespace, Proxy, open_way
from tests.faults.paced import PacedBackend
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig

NUM_CLIENTS = {Size.CI: 2, Size.FULL: 4}
NUM_STREAMS = 8
_SHORT = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 500,
    "grpc.http2.ping_timeout_ms": 500,
}
# Of a handler's end, a step of the engine, and a busy machine.
SLACK_S = 30.0
_MAX_START_S = 60.0


def options(size: Size) -> dict[str, int]:
    """Return the server's channel options."""
    return dict(SERVER_OPTIONS) | (_SHORT if size is Size.CI else {})


def run(size: Size) -> RowResult:
    """Cut the way to clients that hold streams, and wait until nothing is held any more."""
    result = RowResult("R6", "network partition (black-holed TCP)")
    chosen = options(size)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(patch.object(server_module, "SERVER_OPTIONS", tuple(chosen.items())))
        listen = {"host": "0.0.0.0", "insecure_listen": True}  # in every namespace's reach
        rig = stack.enter_context(Rig(folder, max_replays=0, make_backend=_slow_backend, **listen))
        with open_way() as way, ExitStack() as clients:
            _fill(rig, way, clients, NUM_CLIENTS[size])
            way.cut()
            freed_s = _wait(lambda: not _num_held(rig), limit_s_of(chosen) + SLACK_S)
        for backend in rig.backends.values():
            backend.pass_s = 0.0
        journal, reference = (rig.drive(bystanders(NUM_TEMPLATES), name) for name in "ab")
        result.add(rig.ledger(journal, reference), is_under_fault=False)
        result.leaks = rig.leaks()
    _judge(result, size, way, freed_s, limit_s_of(chosen))
    return result


def _slow_backend(**given: Any) -> PacedBackend:
    backend = PacedBackend(**{**given, "max_model_len": 4096})
    backend.pass_s = 0.02
    return backend


def _fill(rig: Rig, way: Namespace | Proxy, stack: ExitStack, num_clients: int) -> None:
    """Start clients, and wait until the server has all their streams."""
    target = way.open(int(rig.server.address.rpartition(":")[2]))
    command = [*way.command, sys.executable, "-m", "tests.faults.callers.held_client", target]
    for _ in range(num_clients):
        client = stack.enter_context(
            subprocess.Popen([*command, str(NUM_STREAMS)], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(client.kill)
    num_wanted = 2 * num_clients * NUM_STREAMS
    is_full = _wait(lambda: _num_held(rig) == num_wanted, _MAX_START_S) is not None
    assert is_full, f"{_num_held(rig)} of {num_wanted} calls and samples in {_MAX_START_S} s"


def _num_held(rig: Rig) -> int:
    """Return calls of the listener, and samples of the engine."""
    load = rig.engines.loaded[0].engine.load()
    return rig.server.gate.num_active + load.num_running + load.num_waiting


def _wait(holds: Callable[[], bool], max_s: float) -> float | None:
    """Return after how many seconds it held; None if it did not."""
    started_s = time.monotonic()
    while not holds():
        if time.monotonic() - started_s > max_s:
            return None
        time.sleep(0.02)
    return time.monotonic() - started_s


def limit_s_of(chosen: dict[str, int]) -> float:
    return (chosen["grpc.keepalive_time_ms"] + chosen["grpc.http2.ping_timeout_ms"]) / 1e3


def _judge(
    result: RowResult, size: Size, way: Namespace | Proxy, freed_s: float | None, limit_s: float
) -> None:
    num_streams = NUM_CLIENTS[size] * NUM_STREAMS
    result.num_requests = num_streams
    result.measured = {
        "way": type(way).__name__.lower(),
        "num_streams": num_streams,
        "freed_s": freed_s,
        "limit_s": limit_s,
    }
    result.demand(freed_s is not None, f"not all was freed {limit_s + SLACK_S:.1f} s later")
