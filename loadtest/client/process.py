"""One client process: it runs its part of a schedule, and hands over what it has seen.

It connects, asks for the arms, waits for the common start, reports now and then, and sends its
records at the end. What has ended is in its own file by then, behind each block: see
`requests_file`. It ends with its parent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bundle.errors import UserError
from loadtest.client.oip_target import OipTarget
from loadtest.client.requests_file import keeping
from loadtest.client.runner import BlockCost, LoadRunner, new_event_loop
from loadtest.client.targets import Credentials, LoadTarget, RunJournal, TandemTarget
from loadtest.config import RunConfig
from loadtest.ledger.journal import Journal, journal_file
from loadtest.records import DatasetPrompt, RequestRecord
from loadtest.workload.schedule import Block

_REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; `elapsed_s` since its start."""

    elapsed_s: float = 0.0
    num_sent: int = 0
    num_ended: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was seen of a schedule, by request number.

    `is_interrupted`: requests were given up. `problems` say why a part of the load is missing: it
    was interrupted, or a client process died.
    """

    records: list[RequestRecord]
    costs: list[BlockCost]
    is_interrupted: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What a client process is told; `part` is the file for its records, if any.

    `run_id` is the same for all processes of a run, and no other run's.
    """

    config: RunConfig
    prompts: Mapping[str, DatasetPrompt]
    credentials: Credentials
    blocks: Sequence[Block]
    process: int
    part: Path | None
    run_id: str


def main(connection: Connection, job: Job) -> None:
    """Run a job, and tell the parent how it goes: what ends it early is sent as an error."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(_run(connection, job))
        except UserError as error:
            connection.send(error)
        except ExceptionGroup as group:  # of a request, or of the file that records are kept in
            if (found := _first_user_error(group)) is None:
                raise
            connection.send(found)


def _first_user_error(group: ExceptionGroup[Exception]) -> UserError | None:
    for each in group.exceptions:
        found = _first_user_error(each) if isinstance(each, ExceptionGroup) else each
        if isinstance(found, UserError):
            return found
    return None


async def _run(connection: Connection, job: Job) -> None:
    with _journal_of(job) as journal:
        await _load(connection, job, journal)


@contextmanager
def _journal_of(job: Job) -> Iterator[RunJournal | None]:
    """Open the process's own journal, if the run has one."""
    if (folder := job.config.journal) is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--journal {folder}: {error.strerror}") from None
    with Journal(journal_file(folder, job.run_id, job.process)) as lines:
        yield RunJournal(lines, job.run_id)


async def _load(connection: Connection, job: Job, journal: RunJournal | None) -> None:
    target = open_target(job.config, job.prompts, job.credentials, journal)
    try:
        await target.check()
        connection.send(None)
        with keeping(job.part) as keep:
            runner = LoadRunner(target, connection.recv(), job.process, keep)
            reports = asyncio.create_task(_report(connection, runner))
            is_interrupted = await _run_until_told(connection, runner, job.blocks)
        reports.cancel()
        with suppress(ConnectionError):  # the parent is gone
            connection.send(_progress(runner))
            connection.send(LoadResult(runner.records, runner.costs, is_interrupted))
    finally:
        await target.close()


async def _run_until_told(
    connection: Connection, runner: LoadRunner, blocks: Sequence[Block]
) -> bool:
    """Return whether the parent stopped it, or ended itself."""
    load = asyncio.create_task(runner.run(blocks))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(connection.fileno())
        load.cancel()

    loop.add_reader(connection.fileno(), stop)
    await asyncio.wait([load])
    loop.remove_reader(connection.fileno())
    if not load.cancelled():
        load.result()
    return load.cancelled()


async def _report(connection: Connection, runner: LoadRunner) -> None:
    while True:
        await asyncio.sleep(_REPORT_INTERVAL_S)
        with suppress(ConnectionError):  # the parent is gone, which ends the load
            connection.send(_progress(runner))


def _progress(runner: LoadRunner) -> Progress:
    return Progress(runner.elapsed_s, len(runner.records), runner.num_ended, runner.num_failed)


def open_target(
    config: RunConfig,
    prompts: Mapping[str, DatasetPrompt],
    credentials: Credentials,
    journal: RunJournal | None = None,
) -> LoadTarget:
    """Return the server of `config`; UserError for credentials that cannot be used."""
    try:
        if config.protocol == "oip":
            return OipTarget(config, prompts, credentials)
        return TandemTarget(config, prompts, credentials, journal)
    except (OSError, ValueError) as error:
        raise UserError(f"--target {config.target}: {error}") from None
