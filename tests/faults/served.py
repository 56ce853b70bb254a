"""`tandem serve` in a process of its own, with models whose answers are known, to be ended at will.

    python -m tests.faults.served serve --bundle unused --port 0

Everything is the real command's but the models: `PacedBackend`s of both roles, whose passes take
FAULTS_PASS_S (a variable of the environment) more than their own time. `tests.faults.broken` has
builds that are broken on purpose.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import torch
from prometheus_client import Gauge

import tandem.cli
from loadtest.ledger.journal import OK
from protos.tandem.v1 import inference_pb2 as pb
from serve.app.config import ServeConfig
from serve.app.process import serve_until_signal
from serve.client import Client
from serve.engine.engine import Engine
from serve.metrics.server_metrics import ServerMetrics
from serve.pair.served import Engines, Role, ServedModel
from tests.faults.paced import PacedBackend
from tests.faults.rig import requests_of
from tests.support.backends import build_tokenizer
from tests.support.processes import TandemProcess

PASS_S = "FAULTS_PASS_S"
MAX_MODEL_LEN = 64
SETTLE_S = 10.0
_PAGE_BYTES = 4096
_COUNTED = (
    "tandem_sequences_running",
    "tandem_sequences_waiting",
    "tandem_ledger_imbalance",
    "served_tasks",
    "served_threads",
)


class ServedProcess(TandemProcess):
    """Such a server; `program` is its module, `pass_s` the time of a pass of a model."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *flags: str,
        program: str = "tests.faults.served",
        pass_s: float = 0.002,
    ) -> None:
        given = ("--bundle", "unused", "--max-model-len", str(MAX_MODEL_LEN), *flags)
        super().__init__(name, folder, given)
        assert self._command[2] == "tandem"
        self._command[2] = program
        self._pass_s = pass_s

    def start(self) -> None:
        with patch.dict(os.environ, {PASS_S: str(self._pass_s)}):
            super().start()

    def wait_ready(self) -> None:
        super().wait_ready()
        with Client(self.address, timeout_s=30) as client:  # what stays after the first call
            client.generate(next(iter(requests_of(1, seed=98)))).result()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


# -- what may not leak --------------------------------------------------------------------------


def holdings(process: TandemProcess) -> dict[str, float]:
    """Return what work takes and must give back: by series of /metrics."""
    return {
        f"{name} {dict(labels)}": abs(value)
        for (name, labels), value in process.metrics().items()
        if name in _COUNTED
    }


def leaks(process: TandemProcess, before: Mapping[str, float], **fields: Any) -> list[str]:
    """Return what has not come back, some seconds at most later; then 20 requests must succeed.

    `fields` are of the requests; whoever loads no teacher has to name a route.
    """
    until_s = time.monotonic() + SETTLE_S
    while (found := _more(before, holdings(process))) and time.monotonic() < until_s:
        time.sleep(0.05)
    with Client(process.address, timeout_s=30, max_attempts=1) as client:
        codes = [_code(client, request) for request in requests_of(20, seed=99, **fields)]
    if bad := [code for code in codes if code != OK]:
        found.append(f"{len(bad)} of 20 requests afterwards failed: {sorted(set(bad))}")
    return found


def _code(client: Client, request: pb.GenerateRequest) -> str:
    try:
        client.generate(request).result()
    except grpc.RpcError as error:
        return error.code().name
    return OK


def _more(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    return [
        f"{name}: {value:g}, at the start {before.get(name, 0):g}"
        for name, value in now.items()
        if value > before.get(name, 0)
    ]


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * _PAGE_BYTES


# -- the program --------------------------------------------------------------------------------


def build_engines(config: ServeConfig, metrics: ServerMetrics) -> Engines:
    """Return two models with known answers, in place of a bundle's."""
    PacedBackend.pass_s = float(os.environ[PASS_S])
    served = {}
    for role in Role:
        backend = PacedBackend(max_num_seqs=config.max_num_seqs, max_model_len=MAX_MODEL_LEN)
        if role is Role.TEACHER:  # another model, for divergences above 0
            generator = torch.Generator().manual_seed(1)
            backend.table += 0.3 * torch.randn(backend.table.shape, generator=generator)
        engine = Engine(
            backend,
            eos_token_ids=frozenset({PacedBackend.EOS}),
            max_waiting=config.max_waiting,
            observer=metrics.observer(role),
            name=role.value,
            num_torch_threads=1,
        )
        served[role] = ServedModel(role, engine, build_tokenizer())
    return Engines(served[Role.STUDENT], served[Role.TEACHER])


async def _serve(engines: Engines, config: ServeConfig, metrics: ServerMetrics) -> None:
    """Serve, and have /metrics count the loop's tasks, and threads but for asyncio's own pool."""
    loop = asyncio.get_running_loop()
    tasks = Gauge("served_tasks", "Tasks of the event loop.", registry=metrics.registry)
    tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
    threads = Gauge("served_threads", "Threads, of no pool.", registry=metrics.registry)
    threads.set_function(
        lambda: sum(not t.name.startswith("asyncio_") for t in threading.enumerate())
    )
    await serve_until_signal(engines, config, metrics)


def main() -> None:
    """Run the command line of `tandem`, and leave the process."""
    with (
        patch("serve.app.process.build_engines", build_engines),
        patch("serve.app.process.serve_until_signal", _serve),
    ):
        tandem.cli.main()


if __name__ == "__main__":
    main()
