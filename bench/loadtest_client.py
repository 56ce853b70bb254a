"""The rate that the load tester's client can send at: against a server that does nothing.

    python -m bench.loadtest_client --rates 500,1000,2000,2500 --seconds 8

The client has one core to itself and the server another one. The server answers every Generate with
one token, the complete sample and the usage, in bytes that it made before. Prints a line per rate
(Poisson arrivals) and one for a closed loop, then all as JSON: requests per second that were
answered, send lag and latency in ms, and the client's share of its core, all of its threads
together. A rate is sustained where the client would be valid in a load test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from loadtest.client.runner import LoadRunner, new_event_loop
from loadtest.client.targets import TandemTarget
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase
from loadtest.workload.schedule import Schedule, plan
from protos.tandem.v1 import inference_pb2 as pb

MAX_CPU_SHARE = 0.8
MAX_LAG_MS = 1.0
_PROMPT = DatasetPrompt("sum", "What is 17 + 25? Give the number only.", "42", "last_number")
_NUM_CLOSED = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", default="500,1000,2000,2500", help="requests per second")
    parser.add_argument("--seconds", type=float, default=8.0, help="per rate, in blocks of one")
    flags = parser.parse_args()
    rates_rps = tuple(float(rate) for rate in flags.rates.split(","))
    own_core, server_core = sorted(os.sched_getaffinity(0))[:2]
    with null_server(server_core) as target:
        os.sched_setaffinity(0, {own_core})
        rows = measure(config_of(target, flags.seconds, rates_rps=rates_rps))
        closed = config_of(target, flags.seconds, arrival="closed", concurrency=(_NUM_CLOSED,))
        rows += measure(closed)
    sustained = [row["load"] for row in rows[:-1] if row["is_sustained"]]
    print(json.dumps({"sustained_rps": max(sustained, default=0.0), "loads": rows}))


def measure(config: RunConfig) -> list[dict[str, Any]]:
    """Run all loads in this process, and print and return a row for each."""
    schedule = plan(config, [_PROMPT])
    with asyncio.Runner(loop_factory=new_event_loop) as loop:
        runner = loop.run(_run(config, schedule))
    rows = [_row(config, schedule, runner, load) for load in schedule.loads]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


async def _run(config: RunConfig, schedule: Schedule) -> LoadRunner:
    target = TandemTarget(config, {_PROMPT.prompt_id: _PROMPT})
    runner = LoadRunner(target, time.monotonic() + 0.1)
    await runner.run(schedule.blocks)
    await target.close()
    return runner


def _row(config: RunConfig, schedule: Schedule, runner: LoadRunner, load: float) -> dict[str, Any]:
    """Return medians over the blocks of a load: others may use the machine during some."""
    blocks = [b for b in schedule.blocks if b.load == load and b.phase is Phase.MEASURED]
    seen = [_measure_block(runner, block.index) for block in blocks]
    row = {name: round(float(np.median([each[name] for each in seen])), 3) for name in seen[0]}
    if config.is_open_loop:
        is_prompt = row["send_lag_p99_ms"] <= MAX_LAG_MS
        row["is_sustained"] = is_prompt and row["cpu_share"] <= MAX_CPU_SHARE
    return {"arrival": config.arrival, "load": load, "num_blocks": len(blocks), **row}


def _measure_block(runner: LoadRunner, index: int) -> dict[str, float]:
    records = [record for record in runner.records if record.plan.block == index]
    assert all(record.is_ok for record in records), next(r for r in records if not r.is_ok)
    answering_s = max(r.ended_s for r in records) - min(r.sent_s for r in records)
    lags_s = [record.send_lag_s for record in records if record.send_lag_s is not None]
    return {
        "answered_rps": len(records) / answering_s,
        "cpu_share": runner.costs[index].cpu_share,
        **_percentiles_ms("latency", [record.e2e_s for record in records]),
        **(_percentiles_ms("send_lag", lags_s) if lags_s else {}),
    }


def _percentiles_ms(name: str, values_s: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{q}_ms": 1e3 * float(np.percentile(values_s, q)) for q in (50, 99)}


def config_of(target: str, seconds: float, **settings: Any) -> RunConfig:
    """Return a run in blocks of a second at most, behind one of warm-up."""
    return RunConfig(
        target=target, out=Path("unused"), arms=("student",), warmup_s=min(1, seconds), gap_s=0.2,
        duration_s=seconds, block_s=1, **settings,
    )  # fmt: skip


# The server


@contextmanager
def null_server(core: int) -> Iterator[str]:
    """Serve on one core, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, core), daemon=True)
    process.start()
    theirs.close()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, core: int) -> None:
    os.sched_setaffinity(0, {core})
    asyncio.run(_serve_forever(connection))


async def _serve_forever(connection: Connection) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((_Handler(),))
    connection.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


class _Handler(grpc.GenericRpcHandler):
    """Answers every method alike: bytes in, bytes out."""

    def __init__(self) -> None:
        self._answer = [event.SerializeToString() for event in _events()]
        self._method: Any = grpc.unary_stream_rpc_method_handler(self._reply)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._method

    async def _reply(self, request: bytes, context: Any) -> None:
        for message in self._answer:
            await context.write(message)


def _events() -> Iterator[pb.GenerateResponse]:
    role = pb.ROLE_STUDENT
    yield pb.GenerateResponse(tokens=pb.TokenChunk(role=role, token_ids=[42], text="42"))
    sample = pb.Sample(
        role=role, text="42", token_ids=[42], finish_reason=pb.FINISH_REASON_STOP,
        answer="42", correct=True,
    )  # fmt: skip
    yield pb.GenerateResponse(complete=pb.Complete(sample=sample))
    usage = pb.Usage(roles=[pb.RoleUsage(role=role, prompt_tokens=9, completion_tokens=1)])
    yield pb.GenerateResponse(usage=usage)


if __name__ == "__main__":
    main()
