"""A bounded worker process that compares answers symbolically and extracts them by pattern.

Both are work on text that a model wrote, and both can take forever: a pattern that backtracks, a
tower of powers. So each job runs in a child process (`serve.pair.answers.child`) under a time and a
memory limit. A job that exceeds one, or takes the child down, has a `NoResult`, which is not an
answer of "no"; the child is replaced for the next one.

There is one child for all requests: each has a turn of bounded length, tenants alternate, and what
a request may have in all is its `WorkerClaim`. `AnswerWorker` lives on one asyncio loop, which it
never blocks. It is not pebble's pool: the child of that imports the server's main module, torch
with it, before it has a limit, and a start that fails ends the pool for good.
"""

from __future__ import annotations

import asyncio
import enum
import importlib.util
import json
import logging
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from serve.errors import TandemError
from serve.pair.answers.child import HEADER
from serve.pair.answers.turns import FairLock

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("child.py")
_START_TIMEOUT_S = 60.0
# The child's time that a claim may use, and the wait for its turns, in time limits of a job: a
# request outlasts another one that uses all of its claim.
_MAX_JOB_TIMES = 2
_MAX_WAIT_TIMES = 4
# Each failure costs a restart besides the time limit.
_MAX_FAILURES = 2
# How much before its deadline a request gives up, so that its reply is there in time.
_REPLY_S = 0.1


class SymbolicUnavailableError(TandemError):
    """Symbolic matching of answers needs math-verify, which is not installed."""


def is_available() -> bool:
    """Say whether math-verify is installed, without importing it."""
    return importlib.util.find_spec("math_verify") is not None


def check_available() -> None:
    """Raise SymbolicUnavailableError unless answers can be matched symbolically here."""
    if not is_available():
        raise SymbolicUnavailableError(
            "evaluation.answer_match is symbolic, and this server has no math-verify installed "
            "(extra `math`); match exactly"
        )


class NoResult(enum.Enum):
    """Why a job has no result; the value is its label in metrics."""

    TIMEOUT = "timeout"  # of the job, of its turn, of the request's claim or deadline
    FAILED = "failed"  # it took the child down, or there is none to be had
    DROPPED = "dropped"  # too much waits, or the worker is stopped


@dataclass(slots=True)
class WorkerClaim:
    """One request's budget at the worker, over all its turns.

    `deadline_s` is on the monotonic clock, None when there is none. `used_s` is the child's time so
    far, `waited_s` the wait for it; `spent` says why there are no further results, once that is so.
    """

    tenant: str = ""
    deadline_s: float | None = None
    used_s: float = 0.0
    waited_s: float = 0.0
    num_failures: int = 0
    spent: NoResult | None = None

    def seconds_left(self) -> float | None:
        """Return the time until the reply is due, None when there is no deadline."""
        if self.deadline_s is None:
            return None
        return self.deadline_s - _REPLY_S - time.monotonic()


class AnswerWorker:
    """One child process, which requests use in turns.

    Args:
        timeout_s: limit of each job.
        max_waiting: requests of one tenant that wait for their turn; further ones have none.
        memory_bytes: limit of the child's address space.
    """

    def __init__(
        self, timeout_s: float, *, max_waiting: int = 64, memory_bytes: int = 1 << 30
    ) -> None:
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._memory_bytes = memory_bytes
        self._lock = FairLock()
        self._child: _Child | None = None
        self._is_stopped = False

    def turn(self, claim: WorkerClaim) -> WorkerTurn:
        """Return the request's next turn, to be entered; it begins with the first job."""
        return WorkerTurn(self, claim)

    async def stop(self) -> None:
        """End the child and what it does; jobs that wait, and later ones, have no results."""
        self._is_stopped = True
        if self._child is not None:
            self._child.kill()
        await self._lock.acquire("")
        await self._end_child()
        self._lock.release()

    async def begin(self, claim: WorkerClaim) -> NoResult | None:
        """Wait for a turn; return why there is none. `end` ends it."""
        if self._lock.num_waiting(claim.tenant) >= self._max_waiting:
            return NoResult.DROPPED
        if (reason := self._why_not(claim)) is not None:
            return reason
        max_wait_s = _MAX_WAIT_TIMES * self._timeout_s - claim.waited_s
        left_s = claim.seconds_left()
        if left_s is not None:
            max_wait_s = min(max_wait_s, left_s)
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(max_wait_s):
                await self._lock.acquire(claim.tenant)
        except TimeoutError:
            return NoResult.TIMEOUT
        finally:
            claim.waited_s += time.monotonic() - began_s
        return None

    def end(self) -> None:
        self._lock.release()

    async def run(self, claim: WorkerClaim, name: str, arguments: tuple[str, ...]) -> Any:
        """Return what the child's function makes of the arguments, or a NoResult.

        Only within a turn. The start of the child counts towards the deadline, not the claim.
        """
        if (reason := self._why_not(claim)) is not None:
            return reason
        try:
            async with asyncio.timeout(claim.seconds_left()):
                return await self._ask(await self._ready_child(name), claim, name, arguments)
        except TimeoutError as error:
            return await self._give_up(claim, NoResult.TIMEOUT, error)
        except (OSError, EOFError) as error:
            return await self._give_up(claim, NoResult.FAILED, error)
        except asyncio.CancelledError:
            await self._end_child()  # it is at work for nobody
            raise

    async def _ask(
        self, child: _Child, claim: WorkerClaim, name: str, arguments: tuple[str, ...]
    ) -> Any:
        max_s = min(self._timeout_s, _MAX_JOB_TIMES * self._timeout_s - claim.used_s)
        began_s = time.monotonic()
        try:
            return await child.ask(name, arguments, max_s)
        finally:
            claim.used_s += time.monotonic() - began_s

    def _why_not(self, claim: WorkerClaim) -> NoResult | None:
        if self._is_stopped:
            return NoResult.DROPPED
        left_s = claim.seconds_left()
        is_late = left_s is not None and left_s <= 0
        if claim.spent is None and (is_late or claim.used_s >= _MAX_JOB_TIMES * self._timeout_s):
            claim.spent = NoResult.TIMEOUT
        return claim.spent

    async def _ready_child(self, name: str) -> _Child:
        """Return a child that is ready for jobs of that name. Raises as `_Child.ask`, OSError."""
        if self._child is None or not self._child.is_alive:
            await self._end_child()
            self._child = await _Child.spawn(self._memory_bytes)
            if self._is_stopped:  # there was no child to kill yet
                self._child.kill()
        await self._child.prepare(name)
        return self._child

    async def _give_up(self, claim: WorkerClaim, reason: NoResult, error: Exception) -> NoResult:
        await self._end_child()
        if self._is_stopped:
            return NoResult.DROPPED
        logger.warning("a job on answers was given up: %r", error)
        claim.num_failures += 1
        if claim.num_failures >= _MAX_FAILURES:
            claim.spent = reason
        return reason

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()


class WorkerTurn:
    """The worker at one request's disposal while the block lasts: `async with worker.turn(claim)`.

    The first job waits for the child, so that a request without jobs waits for nobody; one that
    failed goes behind the others before its next job.
    """

    def __init__(self, worker: AnswerWorker, claim: WorkerClaim) -> None:
        self._worker = worker
        self._claim = claim
        self._is_begun = False

    async def __aenter__(self) -> WorkerTurn:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    async def equivalent(self, gold: str, answer: str) -> bool | NoResult:
        """Say whether two expressions are equivalent."""
        result: bool | NoResult = await self._run("equivalent", gold, answer)
        return result

    async def extract(self, pattern: str, text: str) -> str | NoResult | None:
        """Return group 1 of the pattern's last match in the text; None where there is none."""
        result: str | NoResult | None = await self._run("extract", pattern, text)
        return result

    async def _run(self, name: str, *arguments: str) -> Any:
        if not self._is_begun:
            if (reason := await self._worker.begin(self._claim)) is not None:
                self._claim.spent = reason
                return reason
            self._is_begun = True
        result = await self._worker.run(self._claim, name, arguments)
        if isinstance(result, NoResult):
            self._end()
        return result

    def _end(self) -> None:
        if self._is_begun:
            self._is_begun = False
            self._worker.end()


class _Child:
    """A process that runs one job at a time, and the socket to it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._prepared: set[str] = set()

    @classmethod
    async def spawn(cls, memory_bytes: int) -> _Child:
        """Start it without waiting for it. OSError when no process can be started."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        command = [sys.executable, "-P", str(_CHILD), str(memory_bytes)]
        try:
            with theirs:  # what it prints may hold a model's text
                process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is the server's: running requests drain first
                )
        except OSError:
            writer.close()
            raise
        return cls(process, reader, writer)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def prepare(self, name: str) -> None:
        """Wait until it can run that function: imports may take longer than a job.

        Raises as `ask`.
        """
        if name not in self._prepared:
            await self.ask("prepare", (name,), _START_TIMEOUT_S)
            self._prepared.add(name)

    async def ask(self, name: str, arguments: tuple[str, ...], timeout_s: float) -> Any:
        """Return what the child's function of that name does.

        Raises:
            TimeoutError: it took longer.
            EOFError, ConnectionError: the process ended, by itself soon after the time limit.
        """
        job = {"name": name, "arguments": arguments, "alarm_s": timeout_s + 1}
        message = json.dumps(job).encode()
        self._writer.write(HEADER.pack(len(message)) + message)
        async with asyncio.timeout(timeout_s):
            header = await self._reader.readexactly(HEADER.size)
            return json.loads(await self._reader.readexactly(*HEADER.unpack(header)))

    def kill(self) -> None:
        self._process.kill()

    async def end(self) -> None:
        """Kill the process, and wait until it is gone and its memory is free."""
        self.kill()
        self._writer.close()
        await asyncio.to_thread(self._process.wait)
