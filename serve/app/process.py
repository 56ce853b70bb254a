"""The process of `tandem serve`: load, serve until a signal, drain; a second signal hurries."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from bundle.errors import UserError
from serve.app.config import ServeConfig
from serve.app.grpc_log import quiet_grpc_tracebacks
from serve.app.listeners import check_listeners
from serve.app.loading import build_engines
from serve.app.server import Server
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Engines

logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Load, serve until SIGTERM or SIGINT, drain, return.

    Raises:
        UserError: a setting cannot be had here.
    """
    if config.ready_file is not None:
        _remove_stale(config.ready_file)
    check_listeners(config)
    quiet_grpc_tracebacks()
    metrics = ServerMetrics(CollectorRegistry())
    # In a thread of its own, whose OpenMP pool ends with it: only the engines' pools may be left
    # (docs/decisions/008-threads-that-wait.md).
    with ThreadPoolExecutor(max_workers=1) as loader:
        engines = loader.submit(build_engines, config, metrics).result()
    asyncio.run(serve_until_signal(engines, config, metrics))


def _remove_stale(ready_file: Path) -> None:
    """Remove what a process that was killed left behind: nothing is ready yet."""
    if not ready_file.parent.is_dir():
        raise UserError(f"--ready-file {ready_file}: there is no such folder")
    try:
        ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--ready-file {ready_file}: {error.strerror}") from error


async def serve_until_signal(engines: Engines, config: ServeConfig, metrics: ServerMetrics) -> None:
    """Serve engines until SIGTERM or SIGINT, then drain; a second signal cuts the drain short.

    The ready file is there from the first call that is answered until the drain begins.
    """
    stopping = asyncio.Event()
    server = Server(engines, config, metrics, stopping.set)
    _listen_to_signals(server, stopping)
    try:
        await server.start()
    except (RuntimeError, OSError) as error:  # a port that was free a moment ago
        raise UserError(f"the server cannot listen: {error}") from error
    # What was loaded stays. To look through it, once in some thousand calls, holds up everything
    # for 0.1 s.
    gc.collect()
    gc.freeze()
    logger.info(
        "serving on %s, control on %s, metrics on %s",
        server.address, server.control_address, server.metrics_url,
    )  # fmt: skip
    try:
        with _ready_file(config.ready_file, server):
            await stopping.wait()
        logger.info(
            "draining: %s s still serving, then %s s at most; a second signal ends it at once",
            config.drain_delay_s,
            config.drain_grace_s,
        )
    finally:
        await server.stop()


def _listen_to_signals(server: Server, stopping: asyncio.Event) -> None:
    """Have the first signal begin the drain, also one that was begun already, and others hurry."""
    is_signalled = asyncio.Event()

    def on_signal() -> None:
        if is_signalled.is_set():
            logger.warning("a second signal: what still runs is ended")
            server.hurry()
        is_signalled.set()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


@contextmanager
def _ready_file(path: Path | None, server: Server) -> Iterator[None]:
    """Have the file say where a server listens, during the block alone."""
    if path is None:
        yield
        return
    write_ready_file(path, server)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def write_ready_file(path: Path, server: Server) -> None:
    """Write `{"address": ..., "control_address": ..., "metrics_url": ...}`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    ready = {
        "address": server.address,
        "control_address": server.control_address,
        "metrics_url": server.metrics_url,
    }
    temporary.write_text(json.dumps(ready) + "\n", encoding="utf-8")
    temporary.replace(path)
