"""Journalled calls to a server process: in turns (closed loop), or on time (open loop)."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from loadtest.ledger.journal import OK, AnyRequest, Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient, retry_delay_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended; times are monotonic, `due_s` is when it was to be sent.

    `retry_delay_s` and `text` are what a refusal says.
    """

    request_id: str
    due_s: float
    sent_s: float
    ended_s: float
    code: str
    retry_delay_s: float | None = None
    text: str = ""

    @property
    def is_ok(self) -> bool:
        return self.code == OK

    @property
    def latency_s(self) -> float:
        """Since the call was due, so that a client that is late hides nothing."""
        return self.ended_s - self.due_s


async def call(
    client: AsyncClient, request: AnyRequest, journal: Journal, due_s: float | None = None
) -> Outcome:
    """Send a request, follow it to its end, and say how that was."""
    sent_s = time.monotonic()
    due_s = sent_s if due_s is None else due_s
    journal.sent(request)
    code, delay_s, text = OK, None, ""
    try:
        if isinstance(request, pb.CompareRequest):
            journal.compared(request.request_id, await client.compare(request))
        else:
            async for response in client.generate(request):
                journal.received(request.request_id, response)
    except grpc.RpcError as error:
        code, delay_s, text = error.code().name, retry_delay_s(error), error.details() or ""
    ended_s = time.monotonic()
    journal.ended(request.request_id, code)
    return Outcome(request.request_id, due_s, sent_s, ended_s, code, delay_s, text)


async def call_in_turns(
    client: AsyncClient,
    requests: Iterable[AnyRequest],
    journal: Journal,
    *,
    num_clients: int,
    goes_on: Callable[[], bool] = lambda: True,
    outcomes: list[Outcome] | None = None,
) -> list[Outcome]:
    """Have clients send one request after the other, until there are none or it is to end.

    `outcomes`, or else a new list, gets each outcome as it comes, and is returned.
    """
    outcomes = [] if outcomes is None else outcomes
    shared = iter(requests)

    async def work() -> None:
        while goes_on() and (request := next(shared, None)) is not None:
            outcomes.append(await call(client, request, journal))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(work())
    return outcomes


async def call_on_time(
    client: AsyncClient,
    requests: Iterable[AnyRequest],
    journal: Journal,
    *,
    rate_rps: float,
) -> list[Outcome]:
    """Send requests at a rate, whatever becomes of those before."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        calls = []
        for number, request in enumerate(requests):
            due_s = began_s + number / rate_rps
            await asyncio.sleep(max(due_s - time.monotonic(), 0))
            calls.append(group.create_task(call(client, request, journal, due_s)))
    return [task.result() for task in calls]


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep Python's collector from what was there before, whose size is a pause of the client."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile; 0 of none."""
    return float(np.percentile(values, 99)) if values else 0.0


def codes(outcomes: Iterable[Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.code for outcome in outcomes))
