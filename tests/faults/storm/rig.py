"""The server of a storm: its models stand in a weather, its teacher may be remote."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path
from typing import Any

from serve.client import AsyncClient
from serve.client.channel import Endpoint
from serve.engine.engine import Engine
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Engines, Role
from serve.rpc.credentials.tokens import new_token
from tests.faults.rig import Rig
from tests.faults.storm.backend import StormBackend, Weather, break_sampling
from tests.faults.storm.certificates import Certificates
from tests.faults.storm.plan import TENANTS, Plan
from tests.faults.storm.remote_teacher import RemoteTeacherServer

_SCOPES = "inference,control"


class StormRig(Rig):
    """A server whose models stand in a weather; each tenant has a client."""

    def __init__(self, folder: Path, plan: Plan, **settings: Any) -> None:
        pairs = {tenant: new_token() for tenant in TENANTS}
        self.tokens = folder / "tokens"
        self.token_lines = "".join(f"{t} {sha} {_SCOPES}\n" for t, (_, sha) in pairs.items())
        self.tokens.write_text(self.token_lines, encoding="utf-8")
        self._secrets = {tenant: token for tenant, (token, _) in pairs.items()}
        self.clients: dict[str, AsyncClient] = {}
        self._all_clients: list[AsyncClient] = []
        self._plan = plan
        self.certificates = Certificates(folder) if plan.has_certificates else None
        self.remote: RemoteTeacherServer | None = None
        if self.certificates is not None:
            settings |= self.certificates.settings()
        if plan.is_teacher_remote:
            self.remote = RemoteTeacherServer(
                folder / "remote", plan, self._make_teacher, self.certificates
            )
            settings |= self.remote.settings()
        super().__init__(
            folder,
            max_num_seqs=plan.max_num_seqs,
            max_waiting=plan.max_waiting,
            make_backend=StormBackend,
            connect=self._connect_all,
            auth_tokens=self.tokens,
            **{**plan.settings, **settings},
        )
        for role, backend in self.storm_backends.items():
            backend.rng.seed(f"{plan.seed} {role.value}")
        if self.remote is not None:
            teacher = self.remote.model(self.config, self.metrics)
            self.engines = Engines(self.engines.student, teacher)

    @property
    def storm_backends(self) -> dict[Role, StormBackend]:
        return {r: b for r, b in self.backends.items() if isinstance(b, StormBackend)}

    def _engine(self, role: Role, metrics: ServerMetrics) -> Engine:
        engine = super()._engine(role, metrics)
        sampler = engine.core.runner.sampler
        sampler.sample = break_sampling(  # type: ignore[method-assign]
            sampler.sample, self.storm_backends[role]
        )
        return engine

    def _make_teacher(self, metrics: ServerMetrics) -> Engine:
        """Return an engine for the remote server, with the memory of one that begins."""
        backend = self.storm_backends[Role.TEACHER]
        for row in range(len(backend.rows)):
            backend.scrub_kv(row)
        return self._engine(Role.TEACHER, metrics)

    def endpoint(self, tenant: str, address: str) -> Endpoint:
        tls = self.certificates.tls() if self.certificates is not None else None
        return Endpoint(address, self._secrets[tenant], tls, max_attempts=1)

    def _connect_all(self, address: str) -> AsyncClient:
        for tenant in TENANTS:
            self.clients[tenant] = self._connect_one(tenant, address)
        return self.clients[TENANTS[0]]

    def _connect_one(self, tenant: str, address: str) -> AsyncClient:
        ends = self.endpoint(tenant, address)
        client = AsyncClient(address, max_attempts=1, timeout_s=60, token=ends.token, tls=ends.tls)
        self._all_clients.append(client)
        return client

    async def renew(self, rng: random.Random) -> None:
        """Rotate the certificates, and connect anew; open connections stay."""
        assert self.certificates is not None
        await self.certificates.rotate(rng)
        for tenant in TENANTS:
            client = self._connect_one(tenant, self.server.address)
            await client.get_models()
            self.clients[tenant] = client
        self.client = self.clients[TENANTS[0]]

    async def _start(self) -> None:
        if self.remote is None:
            await super()._start()
            return
        await self.remote.open()
        await super()._start()
        await self.remote.be_found()
        # The least of some counts: a probe has tasks of its own.
        for _ in range(10):
            await asyncio.sleep(0.01)
            counts = self._counts()
            self._baseline = {name: min(n, counts[name]) for name, n in self._baseline.items()}

    async def _stop(self) -> None:
        await asyncio.gather(*(client.close() for client in self._all_clients))
        await self.server.stop()
        if self.remote is not None:
            await self.remote.close()

    def _counts(self) -> dict[str, int]:
        there = self.remote.counts() if self.remote is not None else {}
        return super()._counts() | there

    def leaks(self) -> list[str]:
        # A connection that was given up lives as long as a call of it waits for the collector.
        gc.collect()
        return super().leaks()

    def set_weather(self, weather: Weather) -> None:
        for backend in self.storm_backends.values():
            backend.weather = weather

    @property
    def num_faults(self) -> int:
        there = self.remote.num_faults if self.remote is not None else 0
        return there + sum(backend.num_faults for backend in self.storm_backends.values())
