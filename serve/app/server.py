"""A whole server: engines, gRPC on two listeners, metrics over HTTP, and an orderly end.

Drain: health says NOT_SERVING while work is still taken for the drain delay, new work is refused
with UNAVAILABLE, running work may end within the grace, the rest ends with SHUTDOWN.
(`grpc.aio.Server.stop(grace)` alone does none of this.)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from bundle.errors import UserError
from estimators.answers import ANSWER_FORMATS
from protos.tandem.v1 import control_pb2 as pb
from serve.addresses import is_unix, join_port
from serve.app.config import ServeConfig
from serve.app.listeners import remove_stale_socket, socket_permissions
from serve.errors import TandemError
from serve.http.server import MetricsServer
from serve.metrics.series import begin_series
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.answers.equivalence import AnswerWorker
from serve.pair.answers.formats import compile_formats
from serve.pair.answers.judge import Judge
from serve.pair.coordinator import Coordinator
from serve.pair.request import OTHER_TASK, Limits, Range
from serve.pair.routing import TrafficPolicy
from serve.pair.served import Engines
from serve.pair.shadow import Shadows
from serve.pair.tasks import running
from serve.rpc import control as control_service
from serve.rpc.calls import CallGuard
from serve.rpc.control import ControlService, Lifecycle, check_policy
from serve.rpc.credentials.tls import server_credentials
from serve.rpc.credentials.tokens import TokenFile
from serve.rpc.decoding import MAX_MESSAGE_BYTES
from serve.rpc.gate import OPEN, CallGate, current_client, current_peer
from serve.rpc.health import NAME as HEALTH_NAME
from serve.rpc.health import Health
from serve.rpc.inference import SERVICE_NAME, InferenceService
from serve.rpc.reflection import REFLECTION_NAMES, reflect
from serve.rpc.replay import Replays
from serve.rpc.triton.open_inference import SERVICE_NAME as OPEN_INFERENCE_NAME
from serve.rpc.triton.open_inference import OpenInferenceService

logger = logging.getLogger(__name__)

# A step that takes longer than this to end, behind the grace, is given up.
STOP_S = 10.0
# After the engines have stopped, handlers only have to send what they hold.
_LAST_WORDS_S = 3.5
# Longer than a client takes to come again, and to hear that its connection is closing.
_HOLD_S, _GO_AWAY_S = 0.05, 0.02
_CLOSE_S = 1.0
# What the end of a server takes at most beyond drain delay and grace.
MAX_CLOSE_S = STOP_S + _LAST_WORDS_S + _HOLD_S + _CLOSE_S
# How soon health notices that an engine died or hangs; its status is answered from memory.
_HEALTH_PERIOD_S = 0.25

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # otherwise two servers share a port silently
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a dead peer is noticed after a minute
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),  # long silent calls otherwise die with too_many_pings
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.per_message_decompression", 0),  # it has no bound: serve.rpc.decoding
)


# What a token must allow for each service. None is open to all and not counted, OPEN needs no token
# but is counted. Nothing else can be called.
_COMMON_SCOPES = {
    **{f"/{name}/": "reflection" for name in REFLECTION_NAMES},
    f"/{HEALTH_NAME}/": None,
}
_DATA_SCOPES: Mapping[str, str | None] = {
    f"/{SERVICE_NAME}/": "inference",
    f"/{OPEN_INFERENCE_NAME}/": "inference",
    # Triton's probes are as open as Health.
    f"/{OPEN_INFERENCE_NAME}/ServerLive": OPEN,
    f"/{OPEN_INFERENCE_NAME}/ServerReady": OPEN,
    f"/{OPEN_INFERENCE_NAME}/ModelReady": OPEN,
    **_COMMON_SCOPES,
}
_CONTROL_SCOPES: Mapping[str, str | None] = {
    f"/{control_service.SERVICE_NAME}/": "control",
    **_COMMON_SCOPES,
}


class Server:
    """Serves engines that are built already; owns their start and stop.

    `on_drain` is called, on the loop, when an operator asks for the drain: whoever owns the server
    is to `stop` it then.
    """

    def __init__(
        self,
        engines: Engines,
        config: ServeConfig,
        metrics: ServerMetrics,
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        policy = initial_policy(engines, config)
        self._engines = engines
        self._config = config
        self._metrics = metrics
        self._on_drain = on_drain
        self._started_s = time.monotonic()
        self._state: pb.ServerState = pb.SERVER_STATE_SERVING
        self._health = Health()
        self._health_shown: dict[str, bool] = {}
        self._health_watch: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self._is_hurried = asyncio.Event()
        shadows = Shadows(metrics, config.max_shadows, config.shadow_timeout_s)
        self._answer_worker = AnswerWorker(config.symbolic_timeout_s)
        judge = Judge(self._answer_worker, compile_formats(config.answer_formats))
        limits = limits_of(engines, config)
        self.coordinator = Coordinator(engines, limits, metrics, policy, shadows, judge)
        self._make_servers(TokenFile(config.auth_tokens) if config.auth_tokens else None)
        self._metrics_server: MetricsServer | None = None
        self.address = ""
        self.control_address = ""
        self.metrics_url = ""

    def _make_servers(self, tokens: TokenFile | None) -> None:
        """Make both servers, each behind a gate, and the guard of their calls."""
        config = self._config
        # One each: a client at its limit can still be helped over the control plane.
        self.gate, self._control_gate = (
            CallGate(
                scopes,
                tokens,
                config.max_concurrent_per_peer,
                self._count_rejected,
                self._count_ended,
            )
            for scopes in (_DATA_SCOPES, _CONTROL_SCOPES)
        )
        self._data_server, self._control_server = (
            grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS)
            for gate in (self.gate, self._control_gate)
        )
        self.guard = CallGuard(
            self._metrics,
            config.max_timeout_s,
            current_client.get,
            current_peer.get,
            max_stall_s=config.max_stall_s,
            log_requests=config.log_requests,
        )

    async def start(self) -> None:
        """Listen, then start the engines, then say so.

        Raises:
            RuntimeError, OSError: a port is taken.
            UserError: a socket is, or certificate or key cannot be used.
        """
        config = self._config
        self._register()
        self.address = self._listen(self._data_server, config.host, config.port)
        self.control_address = self._listen(
            self._control_server, config.control_host, config.control_port
        )
        self._metrics_server = MetricsServer(
            self._metrics.registry, self.is_healthy, config.metrics_host, config.metrics_port
        )
        self.metrics_url = self._metrics_server.url
        self._metrics.build_info.labels(_version()).set(1)
        for model in self._engines.loaded:
            self._metrics.watch(model)
        begin_series(self._metrics, self._engines, config.tasks)
        self._engines.start()
        self._show_health()
        await self._data_server.start()
        await self._control_server.start()
        self._metrics_server.start()
        self._health_watch = asyncio.create_task(self._watch_health())

    async def stop(self) -> None:
        """Leave the balancer, drain, end what is left with SHUTDOWN, and close everything.

        Whoever calls while that goes on, or after it, waits for the same end.
        """
        if self._end is None:
            self._end = asyncio.create_task(self._drain_and_close())
        await asyncio.shield(self._end)

    def hurry(self) -> None:
        """Have `stop` wait no longer for running work: it ends with SHUTDOWN."""
        self._is_hurried.set()

    def is_healthy(self) -> bool:
        """Whether new work is wanted: not leaving, and the thread of every engine here lives."""
        return self._health_by_name()["readiness"]

    async def _drain_and_close(self) -> None:
        """Do what `stop` says; nothing here waits for a client without a bound."""
        self._state = pb.SERVER_STATE_LEAVING
        if self._health_watch is not None:
            self._health_watch.cancel()
        self._show_health()
        await self._unless_hurried(asyncio.sleep(self._config.drain_delay_s))
        await self._unless_hurried(self._drain())
        if self._is_hurried.is_set():
            await self.coordinator.drain(0)
        # Joins the engines' threads, which still hand their last events to this loop.
        await asyncio.to_thread(self._engines.stop, STOP_S)
        self._open_inference.close()
        # First: handlers may wait for it.
        await self._answer_worker.stop()
        await self._close_listeners()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)

    async def _close_listeners(self) -> None:
        """Let handlers send what they hold, then tell clients to go, then refuse who is left.

        In this order: what gRPC has received and not handed over when it closes ends with
        CANCELLED, which no client repeats. So those who come again and again are held until all of
        them wait, and are refused when their connections are closing, and they cannot return.
        """
        gates = (self.gate, self._control_gate)
        await asyncio.gather(*(gate.wait_for_current(_LAST_WORDS_S) for gate in gates))
        for gate in gates:
            gate.hold()
        await asyncio.sleep(_HOLD_S)
        self._health.close()
        # What is open then are health watches and idle connections: they need no grace.
        closing = [
            asyncio.create_task(server.stop(_CLOSE_S))
            for server in (self._data_server, self._control_server)
        ]
        await asyncio.sleep(_GO_AWAY_S)
        for gate in gates:
            gate.release()
        await asyncio.gather(*closing)

    async def _drain(self) -> None:
        self._state = pb.SERVER_STATE_DRAINING
        await self.coordinator.drain(self._config.drain_grace_s)

    async def _unless_hurried(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for work, which is cancelled by `hurry`."""
        async with running(work, self._is_hurried.wait()) as (task, hurried):
            await asyncio.wait((task, hurried), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()

    def _register(self) -> None:
        """Give both listeners their services."""
        config, coordinator, guard = self._config, self.coordinator, self.guard
        replays = Replays(config.max_replays, config.max_replay_mib << 20, config.replay_ttl_s)
        inference = InferenceService(coordinator, guard, replays)
        lifecycle = Lifecycle(
            _version(),
            lambda: self._state,
            lambda: time.monotonic() - self._started_s,
            self._on_drain,
        )
        control = ControlService(coordinator, lifecycle, guard)
        self._open_inference = OpenInferenceService(
            inference.generate, coordinator, guard, _version(), self._health_by_name
        )
        self._data_server.add_generic_rpc_handlers(
            (inference.handler(), self._open_inference.handler())
        )
        self._control_server.add_generic_rpc_handlers((control.handler(),))
        for server in (self._data_server, self._control_server):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if config.reflection:
            reflect(self._data_server, SERVICE_NAME, OPEN_INFERENCE_NAME, HEALTH_NAME)
            reflect(self._control_server, control_service.SERVICE_NAME, HEALTH_NAME)

    def _listen(self, server: grpc.aio.Server, host: str, port: int) -> str:
        """Open a port or a socket, encrypted if there is a certificate; return its address."""
        config, address = self._config, join_port(host, port)
        if is_unix(host):
            remove_stale_socket(host)
        with socket_permissions():
            if config.tls_cert is None or config.tls_key is None:
                bound = server.add_insecure_port(address)
            else:
                # Credentials are of one listener: grpc asks each for its first certificate once.
                credentials = server_credentials(
                    config.tls_cert, config.tls_key, config.tls_client_ca
                )
                bound = server.add_secure_port(address, credentials)
        return join_port(host, bound)

    def _count_rejected(self, reason: str, rpc: str, code: grpc.StatusCode) -> None:
        """Count a call that the gate refused, which no `CallGuard` sees."""
        self._metrics.admission_rejections.labels(reason).inc()
        self._count_ended(rpc, code)

    def _count_ended(self, rpc: str, code: grpc.StatusCode) -> None:
        """Count a call that ended without a message, which no `CallGuard` sees either."""
        self._metrics.requests.labels(rpc, "none", code.name, OTHER_TASK).inc()

    def _health_by_name(self) -> dict[str, bool]:
        """Whether each health name but `liveness` is serving.

        A model that died takes readiness with it, not the other model, which goes on answering.
        A remote model that is lost takes nothing with it.
        """
        is_serving = self._state == pb.SERVER_STATE_SERVING
        models = {
            f"model.{model.role.value}": is_serving and model.is_alive
            for model in self._engines.loaded
        }
        is_ready = is_serving and all(model.is_alive for model in self._engines.local)
        return {"": is_ready, "readiness": is_ready, SERVICE_NAME: is_ready, **models}

    def _show_health(self) -> None:
        """Tell the health service what has changed since the last time."""
        current = {"liveness": True, **self._health_by_name()}
        changed = {n: ok for n, ok in current.items() if self._health_shown.get(n) is not ok}
        remote = {f"model.{m.role.value}" for m in self._engines.loaded if m.address}
        for name, is_serving in changed.items():
            self._health.set(name, is_serving)
            is_dead = not is_serving and name not in remote
            if is_dead and self._state == pb.SERVER_STATE_SERVING:
                logger.error("health: %r is not serving, an engine died", name)
        self._health_shown = current

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            self._engines.watch()
            self._show_health()


def _version() -> str:
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def initial_policy(engines: Engines, config: ServeConfig) -> TrafficPolicy:
    """Return the traffic policy of a start; a lone teacher has the weight that nobody gave away.

    Raises:
        UserError: the loaded models cannot do what the configuration wants.
    """
    policy = TrafficPolicy(config.student_weight, config.teacher_weight, config.shadow_rate)
    is_default = policy == TrafficPolicy(shadow_rate=policy.shadow_rate)
    if is_default and engines.student is None:
        policy = replace(policy, student_weight=0.0, teacher_weight=1.0)
    try:
        check_policy(policy, engines)
    except TandemError as error:
        raise UserError(
            f"--student-weight {policy.student_weight:g} --teacher-weight "
            f"{policy.teacher_weight:g} --shadow-rate {policy.shadow_rate:g}: {error}"
        ) from error
    return policy


def limits_of(engines: Engines, config: ServeConfig) -> Limits:
    """Return the bounds of requests: of context and vocabulary the least that is loaded here."""
    models = engines.local
    max_model_len = min(model.engine.info.max_model_len for model in models)
    return Limits(
        max_model_len=max_model_len,
        vocab_size=min(
            min(model.engine.info.vocab_size, model.tokenizer.num_tokens) for model in models
        ),
        missing_token_ids=frozenset(
            i for model in models for i in model.tokenizer.real_tokens.missing_ids
        ),
        tasks=config.tasks,
        answer_formats=(*ANSWER_FORMATS, *config.answer_formats),
        max_queued_samples=config.max_waiting + config.max_num_seqs,
        max_completion_tokens=config.max_completion_tokens or max_model_len,
        max_prompt_bytes=config.max_prompt_bytes,
        num_samples=Range(1, config.max_num_samples),
    )
