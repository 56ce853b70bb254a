"""The remote teacher: a server of its own that ends and begins again, behind a road that breaks.

Its token is another one after each beginning.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from serve.addresses import RemoteAddress
from serve.app.config import ServeConfig
from serve.app.remote import open_endpoint
from serve.app.server import Server
from serve.engine.engine import Engine
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.remote_teacher import RemoteTeacher
from serve.pair.served import Engines, Role, ServedModel
from serve.rpc.credentials.tokens import new_token
from tests.faults.requests.r21_credentials import replace_file
from tests.faults.storm.certificates import Certificates
from tests.faults.storm.plan import Plan
from tests.support.backends import build_tokenizer

_HOST = "127.0.0.1"
_FOUND_S = 10.0
_PROBE_PERIOD_S = 0.1


class Road:
    """A TCP proxy whose connections can be cut, or bring nothing for a time."""

    def __init__(self) -> None:
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.target: int | None = None
        self.flows = asyncio.Event()
        self.flows.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._forward, sock=self._listener)

    async def close(self) -> None:
        self.target = None
        self.flows.set()
        if self._server is not None:
            self._server.close()
            self.cut()
            await self._server.wait_closed()
        while self._writers:
            await asyncio.sleep(0.01)

    def cut(self) -> None:
        """End all connections, without a word."""
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        ends = [writer]
        try:
            if self.target is not None:
                there_reader, there = await asyncio.open_connection(_HOST, self.target)
                self._writers.add(there)
                ends.append(there)
                await asyncio.gather(self._pump(reader, there), self._pump(there_reader, writer))
        except OSError:
            pass  # nobody listens there
        finally:
            for end in ends:
                end.transport.abort()
                self._writers.discard(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self.flows.wait()
                writer.write(data)
                await writer.drain()
            writer.close()


class RemoteTeacherServer:
    """The teacher's server and the road to it; `problems` are what it left behind at its ends."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        make_engine: Callable[[ServerMetrics], Engine],
        certificates: Certificates | None,
    ) -> None:
        folder.mkdir()
        self._make_engine = make_engine
        self._certificates = certificates
        self._tokens, self._token_file = folder / "tokens", folder / "token"
        self._rng = random.Random(f"elsewhere {plan.seed}")
        self._road = Road()
        self._new_token()
        self._settings = {
            **{"port": 0, "control_port": 0, "metrics_port": 0, "bundle": "unused"},
            **{**plan.settings, "auth_tokens": self._tokens, "shadow_rate": 0.0},
        }
        self.address = RemoteAddress(_HOST, self._road.port, certificates is not None)
        self._server: Server | None = None
        self.num_faults = 0
        self.problems: list[str] = []

    def settings(self) -> dict[str, Any]:
        """Return the settings of the server whose teacher this is."""
        files: dict[str, Any] = {"teacher_token_file": self._token_file}
        if self._certificates is not None:
            tls = self._certificates.tls()
            files |= {
                "teacher_tls_ca": tls.ca,
                "teacher_tls_cert": tls.cert,
                "teacher_tls_key": tls.key,
            }
        return {"teacher": str(self.address), **files}

    def model(self, config: ServeConfig, metrics: ServerMetrics) -> ServedModel:
        """Return the teacher as that server has it."""
        tokenizer = build_tokenizer()
        engine = RemoteTeacher(
            str(self.address),
            lambda: open_endpoint(config, self.address),
            tokenizer_hash=tokenizer.hash,
            scoring_timeout_s=config.teacher_timeout_s,
            on_call=lambda rpc, code: metrics.remote_calls.labels(rpc, code).inc(),
            probe_period_s=_PROBE_PERIOD_S,
        )
        self.remote = engine
        return ServedModel(Role.TEACHER, engine, tokenizer, address=str(self.address))

    # -- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._road.open()
        await self._begin()

    async def close(self) -> None:
        await self._road.close()
        await self._end()

    async def be_found(self) -> None:
        """Wait until the other server has found this one, by a probe that ends from now on."""
        self.remote.why_lost = "asked again"
        with suppress(TimeoutError):
            async with asyncio.timeout(_FOUND_S):
                while not self.remote.load().is_alive:
                    await asyncio.sleep(0.01)
            return
        self.problems.append(f"the teacher was not found again: {self.remote.why_lost}")

    async def misbehave_until(self, is_over: asyncio.Event) -> None:
        """End and begin, cut, and bring nothing until then; then all is well again."""
        ways = [self._restart, self._cut, self._hold, self._hold_for_long]
        while not is_over.is_set():
            await self._rng.choice(ways)()
            self.num_faults += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), self._rng.uniform(0, 0.3))

    async def _restart(self) -> None:
        assert self._server is not None
        if self._rng.random() < 0.3:
            self._server.hurry()
        await self._end()
        await asyncio.sleep(self._rng.uniform(0, 0.1))
        self._new_token()
        await self._begin()

    async def _cut(self) -> None:
        self._road.cut()

    async def _hold(self, longest_s: float = 0.1) -> None:
        """Bring nothing for a time, and then what was held, or never."""
        self._road.flows.clear()
        await asyncio.sleep(self._rng.uniform(0, longest_s))
        if self._rng.random() < 0.5:
            self._road.cut()
        self._road.flows.set()

    async def _hold_for_long(self) -> None:
        await self._hold(longest_s=1.0)

    async def _begin(self) -> None:
        metrics = ServerMetrics(CollectorRegistry())
        tokenizer = build_tokenizer()
        teacher = ServedModel(Role.TEACHER, self._make_engine(metrics), tokenizer)
        tls = self._certificates.settings() if self._certificates is not None else {}
        grace_s = self._rng.choice([0.0, 0.05, 5.0])
        config = ServeConfig(**{**self._settings, **tls, "drain_grace_s": grace_s})
        self._metrics, self._teacher = metrics, teacher
        self._server = Server(Engines(None, teacher), config, metrics)
        await self._server.start()
        self._road.target = int(self._server.address.rpartition(":")[2])

    async def _end(self) -> None:
        assert self._server is not None
        await self._server.stop()
        left = {name: n for name, n in self.counts().items() if n}
        if left:
            self.problems.append(f"behind its end the teacher's server has {left}")

    def counts(self) -> dict[str, int]:
        """Return what work takes there and must give back."""
        assert self._server is not None
        load = self._teacher.engine.load()
        imbalance = self._metrics.registry.get_sample_value("tandem_ledger_imbalance") or 0.0
        return {
            "remote slots": load.num_running,
            "remote queue": load.num_waiting,
            "remote unaccounted": abs(load.num_unaccounted),
            "remote ledger_imbalance": int(abs(imbalance)),
            "remote requests": self._server.coordinator.num_running,
            "remote calls": self._server.gate.num_active,
        }

    def _new_token(self) -> None:
        secret, sha256 = new_token()
        replace_file(self._tokens, f"front {sha256} inference\n".encode())
        replace_file(self._token_file, secret.encode())
