"""A whole server: engines, gRPC with health, metrics over HTTP, and an orderly end.

Drain: health says NOT_SERVING, new work is refused with UNAVAILABLE, running work may end within
the grace, the rest ends with SHUTDOWN. (`grpc.aio.Server.stop(grace)` alone does none of this.)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1.health import aio as health  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry

from serve.config import ServeConfig
from serve.coordinator import Coordinator
from serve.loading import build_engines
from serve.metrics import MetricsServer, ServerMetrics
from serve.routing import Engines
from serve.service import SERVICE_NAME, InferenceService
from serve.specs import Limits

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

logger = logging.getLogger(__name__)

# After the engines have stopped, handlers only have to send what they hold.
_LAST_WORDS_S = 5.0
# How soon health notices that an engine died; its status is answered from memory.
_HEALTH_PERIOD_S = 0.25

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # otherwise two servers share a port silently
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a dead peer is noticed after a minute
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),  # long silent calls otherwise die with too_many_pings
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.max_receive_message_length", 4 << 20),
)


class Server:
    """Serves engines that are built already; owns their start and stop."""

    def __init__(self, engines: Engines, config: ServeConfig, metrics: ServerMetrics) -> None:
        self._engines = engines
        self._config = config
        self._metrics = metrics
        self._health = health.HealthServicer()
        self._health_shown: dict[str, bool] = {}
        self._health_watch: asyncio.Task[None] | None = None
        self._is_draining = False
        self._coordinator = Coordinator(engines, limits_of(engines, config), metrics)
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        self._metrics_server: MetricsServer | None = None
        self.address = ""
        self.metrics_url = ""

    async def start(self) -> None:
        """Listen, then start the engines, then say so. RuntimeError, OSError: a port is taken."""
        config = self._config
        service = InferenceService(self._coordinator, self._metrics)
        self._server.add_generic_rpc_handlers((service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        port = self._server.add_insecure_port(f"{_bracketed(config.host)}:{config.port}")
        self.address = f"{_bracketed(config.host)}:{port}"
        self._metrics_server = MetricsServer(
            self._metrics.registry, self.is_healthy, config.host, config.metrics_port
        )
        self.metrics_url = self._metrics_server.url
        self._metrics.build_info.labels(_version()).set(1)
        for model in self._engines.loaded:
            self._metrics.watch(model)
        self._engines.start()
        await self._server.start()
        self._metrics_server.start()
        await self._show_health()
        self._health_watch = asyncio.create_task(self._watch_health())

    async def stop(self) -> None:
        """Drain, end what is left with SHUTDOWN, and close everything."""
        self._is_draining = True
        if self._health_watch is not None:
            self._health_watch.cancel()
        await self._show_health()
        await self._coordinator.drain(self._config.drain_grace_s)
        # Joins the engines' threads, which still hand their last events to this loop.
        await asyncio.to_thread(self._engines.stop)
        await self._server.stop(_LAST_WORDS_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)

    def is_healthy(self) -> bool:
        """Whether new work is taken: not draining, and every engine's thread lives."""
        return all(self._health_by_name().values())

    def _health_by_name(self) -> dict[str, bool]:
        """Whether each health name but `liveness` is serving.

        A model that died takes readiness with it, not the other model, which goes on answering.
        """
        models = {
            f"model.{model.role.value}": not self._is_draining and model.engine.load().is_alive
            for model in self._engines.loaded
        }
        is_ready = all(models.values())
        return {"": is_ready, "readiness": is_ready, SERVICE_NAME: is_ready, **models}

    async def _show_health(self) -> None:
        """Tell the health service what has changed since the last time."""
        current = {"liveness": True, **self._health_by_name()}
        changed = {n: ok for n, ok in current.items() if self._health_shown.get(n) is not ok}
        for name, is_serving in changed.items():
            await self._health.set(name, _SERVING if is_serving else _NOT_SERVING)
            if not is_serving and not self._is_draining:
                logger.error("health: %r is not serving, an engine died", name)
        self._health_shown = current

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            await self._show_health()


def _version() -> str:
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def limits_of(engines: Engines, config: ServeConfig) -> Limits:
    """Return the bounds of requests: of context and vocabulary the least that is loaded."""
    models = engines.loaded
    return Limits(
        max_model_len=min(model.engine.info.max_model_len for model in models),
        vocab_size=min(
            min(model.engine.info.vocab_size, model.tokenizer.vocab_size) for model in models
        ),
        tasks=config.tasks,
    )


def serve(config: ServeConfig) -> None:
    """Load, serve until SIGTERM or SIGINT, drain, return."""
    metrics = ServerMetrics(CollectorRegistry())
    # In a thread of its own, whose OpenMP pool ends with it: the engines' pools shall be the only
    # ones, since pools that exceed the cores together stop spinning (docs/log.md).
    with ThreadPoolExecutor(max_workers=1) as loader:
        engines = loader.submit(build_engines, config, metrics).result()
    asyncio.run(serve_until_signal(engines, config, metrics))


async def serve_until_signal(engines: Engines, config: ServeConfig, metrics: ServerMetrics) -> None:
    """Serve engines until SIGTERM or SIGINT; the ready file appears when calls are answered."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(engines, config, metrics)
    await server.start()
    logger.info("serving on %s, metrics on %s", server.address, server.metrics_url)
    if config.ready_file is not None:
        write_ready_file(config.ready_file, server)
    await stopping.wait()
    logger.info("draining, %s s at most", config.drain_grace_s)
    await server.stop()


def write_ready_file(path: Path, server: Server) -> None:
    """Write `{"address": ..., "metrics_url": ...}`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    ready = {"address": server.address, "metrics_url": server.metrics_url}
    temporary.write_text(json.dumps(ready) + "\n", encoding="utf-8")
    temporary.replace(path)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
