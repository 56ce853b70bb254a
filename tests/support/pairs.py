"""Two fake models behind engines, and servers of them on port 0 with real channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import torch
from prometheus_client import CollectorRegistry

from protos.tandem.v1 import inference_pb2_grpc
from serve.app.config import ServeConfig
from serve.app.server import Server
from serve.client import Client, ControlClient
from serve.engine.engine import Engine
from serve.engine.turns import StepArbiter
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Engines, Role, ServedModel
from serve.text.tokenizer import Tokenizer
from tests.support.backends import EOS, TOKENIZER, FakeBackend, random_logits


class Pair:
    """Two fake backends, the engines over them, and the metrics that both report to."""

    def __init__(
        self,
        student: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
        *,
        roles: tuple[Role, ...] = (Role.STUDENT, Role.TEACHER),
        tokenizers_by_role: dict[Role, Tokenizer] | None = None,
        max_model_len: int = 256,
        max_num_seqs: int = 8,
        max_waiting: int = 64,
        arbiter: StepArbiter | None = None,
        max_step_s: float = 120.0,
    ) -> None:
        self.metrics = ServerMetrics(CollectorRegistry())
        chosen = {Role.STUDENT: student, Role.TEACHER: teacher}
        self.backends: dict[Role, FakeBackend] = {}
        served = {}
        for seed, role in enumerate(roles, 1):
            logits = chosen[role]
            self.backends[role] = FakeBackend(
                random_logits(seed) if logits is None else logits,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
            )
            engine = Engine(
                self.backends[role],
                eos_token_ids=frozenset({EOS}),
                max_waiting=max_waiting,
                observer=self.metrics.observer(role),
                name=role.value,
                arbiter=arbiter,
                priority=seed if arbiter else 0,
                max_step_s=max_step_s,
            )
            tokenizer = (tokenizers_by_role or {}).get(role, TOKENIZER)
            served[role] = ServedModel(role, engine, tokenizer, "bundle-1", "ab" * 32)
        self.engines = Engines(served.get(Role.STUDENT), served.get(Role.TEACHER))

    def value(self, name: str, **labels: str) -> float:
        """Return a metric's value; a series that nobody touched counts as 0."""
        value = self.metrics.registry.get_sample_value(f"tandem_{name}", labels)
        return 0.0 if value is None else value


class LiveServer:
    """A server on its own ports, and ways to call it."""

    def __init__(self, server: Server, pair: Pair, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.pair = pair
        self.loop = loop
        # Without retries: tests want to see what the server said first.
        self.client = Client(server.address, timeout_s=30, max_attempts=1)
        self.control = ControlClient(server.control_address, timeout_s=30, max_attempts=1)
        self.channel = grpc.insecure_channel(server.address)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def stop_soon(self) -> object:
        """Begin the drain, if it has not begun; the result's `result()` waits for its end."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)


@contextmanager
def serve(
    loop: asyncio.AbstractEventLoop,
    pair: Pair,
    *,
    on_drain: Callable[[], None] = lambda: None,
    **settings: object,
) -> Iterator[LiveServer]:
    """Run a real server of the pair on `loop`, and drain it at the end."""
    config = ServeConfig(
        bundle="unused",
        control_port=0,
        metrics_port=0,
        **{"port": 0, "drain_grace_s": 5, **settings},
    )

    async def start() -> Server:
        server = Server(pair.engines, config, pair.metrics, on_drain)
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    live = LiveServer(server, pair, loop)
    try:
        yield live
    finally:
        for backend in pair.backends.values():
            backend.may_run.set()
        live.stop_soon().result(30)
        live.client.close()
        live.control.close()
        live.channel.close()
