"""A server in this process whose answers are known, clients that journal, and what may not leak.

The models are `HistoryBackend`s: each token depends on every token before it, so a row of the
cache that was moved, forked or cut wrongly shows in the tokens. Server and clients share one event
loop on a thread of its own, as grpc.aio wants it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from prometheus_client import CollectorRegistry

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import Ledger, check
from protos.tandem.v1 import inference_pb2 as pb
from serve.app.config import ServeConfig
from serve.app.server import Server
from serve.client import AsyncClient
from serve.engine.engine import Engine
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Engines, Role, ServedModel
from tests.support.backends import HistoryBackend, build_tokenizer

T = TypeVar("T")
Send = Callable[[AsyncClient, pb.GenerateRequest, Journal], Awaitable[None]]

SETTLE_S = 10.0


def requests_of(
    count: int, *, num_templates: int = 200, seed: int = 0, **fields: Any
) -> Iterable[pb.GenerateRequest]:
    """Yield Generate requests of `num_templates` kinds in turns, each under an id of its own.

    `fields` are of GenerateRequest and replace what is drawn.
    """
    rng = random.Random(seed)
    templates = [_template(rng, fields) for _ in range(min(count, num_templates))]
    for number in range(count):
        request = pb.GenerateRequest(request_id=f"{seed}-{number}")
        request.MergeFrom(templates[number % len(templates)])
        yield request


def _template(rng: random.Random, fields: dict[str, Any]) -> pb.GenerateRequest:
    given = {
        "route": rng.choice([pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH]),
        "prompt_token_ids": pb.TokenIds(ids=rng.choices(range(4, 40), k=rng.randint(1, 16))),
        "sampling": pb.SamplingParams(
            num_samples=rng.choice([1, 1, 2, 4]),
            seed=rng.randrange(2**64),
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice([0.0, 0.7, 1.0]),
        ),
        **fields,
    }
    return pb.GenerateRequest(**given)


async def send(client: AsyncClient, request: pb.GenerateRequest, journal: Journal) -> None:
    """Send a request and follow it to its end, journalled."""
    journal.sent(request)
    await journal.follow(request, client.generate(request))


def _connect(address: str) -> AsyncClient:
    return AsyncClient(address, max_attempts=1, timeout_s=60)


class Rig(AbstractContextManager["Rig"]):
    """A server with two models; `backends` may be told to fail, `settings` are of ServeConfig.

    `connect` makes the client of the server's address that `drive` and `leaks` use.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_num_seqs: int = 8,
        max_waiting: int = 256,
        make_backend: Callable[..., HistoryBackend] = HistoryBackend,
        connect: Callable[[str], AsyncClient] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self._connect = connect or _connect
        self.metrics = ServerMetrics(CollectorRegistry())
        self.backends = {
            role: make_backend(max_num_seqs=max_num_seqs, max_model_len=64) for role in Role
        }
        # Another model, for divergences above 0.
        generator = torch.Generator().manual_seed(1)
        table = self.backends[Role.TEACHER].table
        table += 0.3 * torch.randn(table.shape, generator=generator)
        self._max_waiting = max_waiting
        self._max_pass_tokens: int | None = settings.get("max_pass_tokens")
        tokenizer = build_tokenizer()
        models = {
            role: ServedModel(role, self._engine(role, self.metrics), tokenizer) for role in Role
        }
        self.engines = Engines(models[Role.STUDENT], models[Role.TEACHER])
        given = {"drain_grace_s": 5, "max_concurrent_per_peer": 100_000, **settings}
        self.config = ServeConfig(
            bundle="unused", **{"port": 0, "control_port": 0, "metrics_port": 0, **given}
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rig")

    def _engine(self, role: Role, metrics: ServerMetrics) -> Engine:
        return Engine(
            self.backends[role],
            eos_token_ids=frozenset({HistoryBackend.EOS}),
            max_waiting=self._max_waiting,
            max_pass_tokens=self._max_pass_tokens,
            observer=metrics.observer(role),
            name=role.value,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of server and clients, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _start(self) -> None:
        self.server = Server(self.engines, self.config, self.metrics)
        await self.server.start()
        self.client = self._connect(self.server.address)
        await self.client.get_models()
        # The loop's pool, which tokenizes, has all its threads from the start.
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.02) for _ in range(32)))
        await asyncio.sleep(0.1)
        self._baseline = self._counts()

    async def _stop(self) -> None:
        await self.client.close()
        await self.server.stop()

    def value(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 where nothing has touched it."""
        return self.metrics.registry.get_sample_value(f"tandem_{name}", labels) or 0.0

    # -- work -------------------------------------------------------------------------------

    def drive(
        self,
        requests: Iterable[pb.GenerateRequest],
        name: str,
        *,
        num_clients: int = 32,
        send: Send = send,
    ) -> Path:
        """Have clients send the requests, one after the other each; return their journal."""
        path = self.folder / f"{name}.jsonl"
        self.run(self.send_all(iter(requests), path, num_clients, send))
        return path

    async def send_all(
        self, requests: Iterable[pb.GenerateRequest], path: Path, num_clients: int, send: Send
    ) -> None:
        async def client_loop(journal: Journal) -> None:
            for request in requests:  # one iterator, shared by all
                await send(self.client, request, journal)

        with Journal(path) as journal:
            await asyncio.gather(*(client_loop(journal) for _ in range(num_clients)))

    def ledger(self, journal: Path, reference: Path, **options: Any) -> Ledger:
        """Hold a journal against one of the same requests without faults."""
        return check(read_journal([journal]), read_journal([reference]), **options)

    # -- what may not leak ------------------------------------------------------------------

    def leaks(self) -> list[str]:
        """Return what has not come back to where it was at the start, some seconds at most later.

        Then twenty more requests must succeed.
        """
        until_s = time.monotonic() + SETTLE_S
        while (found := self.run(self.found_leaks())) and time.monotonic() < until_s:
            time.sleep(0.05)
        codes = self.run(self._probe(20))
        if bad := [code for code in codes if code != "OK"]:
            found.append(f"{len(bad)} of 20 requests afterwards failed: {sorted(set(bad))}")
        return found

    async def found_leaks(self) -> list[str]:
        now = self._counts()
        return [
            f"{name}: {now[name]}, at the start {before}"
            for name, before in self._baseline.items()
            if now[name] > before
        ]

    def _counts(self) -> dict[str, int]:
        """Return everything that work takes and must give back."""
        loads = {model.role.value: model.engine.load() for model in self.engines.loaded}
        return {
            **{f"{role} slots": load.num_running for role, load in loads.items()},
            **{f"{role} queue": load.num_waiting for role, load in loads.items()},
            "ledger_imbalance": int(abs(self.value("ledger_imbalance"))),
            "requests": self.server.coordinator.num_running,
            "calls": self.server.gate.num_active,
            "tasks": len(asyncio.all_tasks(self.loop)),
            "threads": threading.active_count(),
        }

    async def _probe(self, count: int) -> list[str]:
        journal_path = self.folder / "probe.jsonl"
        with Journal(journal_path) as journal:
            codes = []
            for request in requests_of(count, seed=99):
                journal.sent(request)
                codes.append(await journal.follow(request, self.client.generate(request)))
        return codes
