"""The parent of the client processes: each runs its part of the schedule, all by the same clock.

It draws progress and answers Ctrl-C, so that neither delays a request; `process` has their side.
"""

from __future__ import annotations

import multiprocessing
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bundle.errors import UserError
from loadtest.client.process import Job, LoadResult, Progress, main
from loadtest.client.requests_file import part_file, read_parts
from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt
from loadtest.workload.schedule import Block

# From the last process's readiness to the run's start.
_START_DELAY_S = 0.2
_END_TIMEOUT_S = 5.0
_ENDING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "it was interrupted: a part of its load is missing"


class ClientFailedError(UserError):
    """A client process ended before its time; its own traceback is on stderr."""


def run_load(
    config: RunConfig,
    prompts: Mapping[str, DatasetPrompt],
    blocks: Sequence[Block],
    on_progress: Callable[[Progress], None],
    credentials: Credentials = Credentials(),  # noqa: B008 - frozen
    folder: Path | None = None,
) -> LoadResult:
    """Run the blocks with `config.processes` processes; call it from the main thread.

    Records are kept in `folder`, a file of each process, from the end of their block on. The first
    Ctrl-C or SIGTERM ends the load and keeps what was recorded, the second one does what it does.
    So does a process that ends before its time: of its records those in its file are left.

    Raises:
        UserError: the server cannot be reached, or does not serve an arm.
        ClientFailedError: a process ended before the load began; the others are ended, too.
    """
    clients: list[_Client] = []
    run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
    try:
        for process in range(config.processes):
            part = partition(blocks, process, config.processes)
            file = None if folder is None else part_file(folder, process)
            clients.append(_Client(Job(config, prompts, credentials, part, process, file, run_id)))
        _start_together(clients)
        with _stopping(clients):
            _collect(clients, on_progress)
    finally:
        for client in clients:
            client.end()
    return _merge([client.result for client in clients if client.result is not None])


def partition(blocks: Sequence[Block], process: int, num_processes: int) -> list[Block]:
    """Return a process's part of each block: every n-th request, and of the workers as many.

    >>> [(5 + 3 - 1 - process) // 3 for process in range(3)]
    [2, 2, 1]
    """
    parts = []
    for block in blocks:
        requests = tuple(r for r in block.requests if r.number % num_processes == process)
        load = block.load
        if requests and requests[0].intended_s is None:
            load = (round(load) + num_processes - 1 - process) // num_processes
        parts.append(replace(block, load=load, requests=requests))
    return parts


class _Client:
    """A client process, as its parent sees it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.progress = Progress()
        self.result: LoadResult | None = None
        self._job = job
        self._process: BaseProcess = context.Process(target=main, args=(theirs, job), daemon=True)
        with _without_interrupts(), theirs:
            self._process.start()

    def receive(self) -> Any:
        """Return the next message. UserError: the child's own; ClientFailedError: it is gone."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(_END_TIMEOUT_S)
            raise ClientFailedError(
                f"client process {self._job.process} ended with exit code "
                f"{self._process.exitcode} before its requests did"
            ) from None
        if isinstance(message, UserError):
            raise message
        return message

    def take(self) -> None:
        message = self.receive()
        if isinstance(message, Progress):
            self.progress = message
        else:
            assert isinstance(message, LoadResult)
            self.result = message

    def bury(self, error: ClientFailedError) -> None:
        """Take what it has left behind as its result."""
        part = self._job.part
        records = read_parts([part]) if part is not None and part.exists() else []
        self.result = LoadResult(records, [], problems=(f"{error}: a part of the load is missing",))

    def stop(self) -> None:
        """Have it end early and hand over what it has."""
        with suppress(OSError):  # it has ended already
            self.connection.send(None)

    def end(self) -> None:
        if self.result is None:
            self._process.kill()
        self._process.join(_END_TIMEOUT_S)
        self.connection.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started here ignore what ends a load: their parent tells them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _stopping(clients: Sequence[_Client]) -> Iterator[None]:
    """Have the next signal that ends a load stop the clients; another one does what it did."""
    before = {number: signal.getsignal(number) for number in _ENDING}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        for client in clients:
            client.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


def _start_together(clients: Sequence[_Client]) -> None:
    """Wait until all are connected, and tell them when time begins."""
    for client in clients:
        client.receive()
    start_s = time.monotonic() + _START_DELAY_S
    for client in clients:
        client.connection.send(start_s)


def _collect(clients: Sequence[_Client], on_progress: Callable[[Progress], None]) -> None:
    by_connection = {client.connection: client for client in clients}
    while by_connection:
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            client = by_connection[connection]
            try:
                client.take()
            except ClientFailedError as error:
                client.bury(error)
                for other in by_connection.values():
                    other.stop()
            if client.result is not None:
                del by_connection[connection]
        on_progress(_sum([client.progress for client in clients]))


def _sum(parts: Sequence[Progress]) -> Progress:
    return Progress(
        elapsed_s=max(part.elapsed_s for part in parts),
        num_sent=sum(part.num_sent for part in parts),
        num_ended=sum(part.num_ended for part in parts),
        num_failed=sum(part.num_failed for part in parts),
    )


def _merge(parts: Sequence[LoadResult]) -> LoadResult:
    records = [record for part in parts for record in part.records]
    costs = [cost for part in parts for cost in part.costs]
    is_interrupted = any(part.is_interrupted for part in parts)
    deaths = tuple(problem for part in parts for problem in part.problems)
    return LoadResult(
        sorted(records, key=lambda record: record.plan.number),
        sorted(costs, key=lambda cost: (cost.block, cost.process)),
        is_interrupted,
        deaths or ((INTERRUPTED,) if is_interrupted else ()),
    )
