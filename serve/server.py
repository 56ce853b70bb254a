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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1.health import aio as health  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry

from bundle.errors import BundleError, UserError
from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME, Manifest
from bundle.verify import verify_bundle
from serve.arbiter import StepArbiter
from serve.config import ServeConfig
from serve.coordinator import Coordinator
from serve.engine import Engine
from serve.metrics import MetricsServer, ServerMetrics
from serve.routing import Engines, Role, ServedModel
from serve.service import SERVICE_NAME, InferenceService
from serve.specs import Limits
from serve.tokenization import Tokenizer

if TYPE_CHECKING:
    from serve.backend import Backend

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

logger = logging.getLogger(__name__)

# After the engines have stopped, handlers only have to send what they hold.
_LAST_WORDS_S = 5.0

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
        await self._set_health(_SERVING, "liveness", *self._services())

    async def stop(self) -> None:
        """Drain, end what is left with SHUTDOWN, and close everything."""
        self._is_draining = True
        await self._set_health(_NOT_SERVING, *self._services())
        await self._coordinator.drain(self._config.drain_grace_s)
        # Joins the engines' threads, which still hand their last events to this loop.
        await asyncio.to_thread(self._engines.stop)
        await self._server.stop(_LAST_WORDS_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)

    def is_healthy(self) -> bool:
        """Whether new work is taken: not draining, and every engine's thread lives."""
        engines = [model.engine for model in self._engines.loaded]
        return not self._is_draining and all(engine.load().is_alive for engine in engines)

    def _services(self) -> list[str]:
        """The health names that say whether new work is taken; `liveness` is not among them."""
        models = [f"model.{model.role.value}" for model in self._engines.loaded]
        return ["", "readiness", SERVICE_NAME, *models]

    async def _set_health(self, status: int, *services: str) -> None:
        for service in services:
            await self._health.set(service, status)


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
    engines = build_engines(config, metrics)
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


# Loading. Torch and onnxruntime are imported here alone.


def build_engines(config: ServeConfig, metrics: ServerMetrics) -> Engines:
    """Load the bundle's student, and the teacher where one is given.

    Raises:
        BundleError: the bundle is damaged, or `variant` is not in it.
        UserError: a model cannot be served: device, architecture or context length.
    """
    import torch

    manifest = verify_bundle(config.bundle)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # On one CPU two engines take turns, the student first; on CUDA the device schedules.
    arbiter = StepArbiter() if device == "cpu" and config.teacher is not None else None

    def engine(role: Role, backend: Backend, folder: Path) -> Engine:
        return Engine(
            backend,
            eos_token_ids=read_eos_token_ids(folder),
            max_waiting=config.max_waiting,
            name=role.value,
            observer=metrics.observer(role),
            arbiter=arbiter,
            priority=0 if role is Role.STUDENT else 1,
        )

    folder = config.bundle / "student"
    tokenizer = Tokenizer.load(folder)
    with _loading(config.bundle):
        student = engine(Role.STUDENT, _load_student(config, manifest, device), folder)
    origin = {
        "bundle_id": config.bundle.resolve().name,
        "manifest_sha256": hash_file(config.bundle / MANIFEST_NAME),
    }
    served = ServedModel(Role.STUDENT, student, tokenizer, **origin)
    if config.teacher is None:
        return Engines(served)
    with _loading(config.teacher):
        teacher = engine(
            Role.TEACHER, _load_teacher(config, config.teacher, device), config.teacher
        )
    # One vocabulary, one tokenizer: both models must see the very same prompt.
    own = Tokenizer.load(config.teacher)
    shared = tokenizer if own.hash == tokenizer.hash else own
    return Engines(served, ServedModel(Role.TEACHER, teacher, shared))


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Say which model a runtime refused; it says why."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {error}") from error


def _load_student(config: ServeConfig, manifest: Manifest, device: str) -> Backend:
    if config.student_backend == "torch":
        return _load_torch(config.bundle / "student", "float32", config, device)
    variant = config.variant or manifest.default_variant
    if variant not in manifest.variants:
        raise BundleError(f"variant {variant!r} is none of {', '.join(sorted(manifest.variants))}")
    return _load_onnx(
        config.bundle / "onnx" / variant,
        config,
        device,
        precision=manifest.variants[variant].precision,
        num_parameters=manifest.student.num_parameters,
    )


def _load_teacher(config: ServeConfig, folder: Path, device: str) -> Backend:
    if config.teacher_backend == "torch":
        return _load_torch(folder, config.teacher_dtype, config, device)
    return _load_onnx(folder, config, device)


def _load_torch(folder: Path, dtype: str, config: ServeConfig, device: str) -> Backend:
    import torch

    from serve.torch_backend import TorchBackend

    return TorchBackend.load(
        folder,
        device=device,
        dtype=getattr(torch, dtype),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )


def _load_onnx(folder: Path, config: ServeConfig, device: str, **described: Any) -> Backend:
    from serve.onnx_backend import OnnxBackend

    return OnnxBackend.load(
        folder,
        device=device,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        num_threads=config.threads,
        **described,
    )


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """Return `eos_token_id` (an id or a list of them) of generation_config.json, else config.json.

    Raises:
        ValueError: neither file names one, so that no completion would ever end.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    raise ValueError(f"{folder}: neither generation_config.json nor config.json has eos_token_id")
