"""A bounded worker process that compares answers symbolically and extracts them by pattern.

Both are work on text that a model wrote, and both can take forever: a pattern that backtracks, a
tower of powers. So each job runs in a child process (`serve.answer_child`) under a time and a
memory limit. A job that exceeds one, or takes the child down, has no result (None); the child is
replaced for the next one.

`AnswerWorker` lives on one asyncio loop, which it never blocks.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.answer_child import HEADER
from serve.errors import TandemError

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("answer_child.py")
_START_TIMEOUT_S = 60.0
# A call of many jobs gives up behind so many without a result: each costs the limit and a restart.
_MAX_FAILURES = 2


class SymbolicUnavailableError(TandemError):
    """Answers shall be matched symbolically, and math-verify is not installed."""


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


@dataclass(frozen=True, slots=True)
class _Call:
    """One function of the child, the arguments of each of its jobs, and where results go."""

    name: str
    arguments: list[tuple[str, str]]
    results: asyncio.Future[list[Any]]


class AnswerWorker:
    """Runs calls one after the other, in order, in one child process.

    Args:
        timeout_s: limit of each job of a call.
        max_waiting: calls that wait for their turn; further ones have no results, at once.
        memory_bytes: limit of the child's address space.

    `num_dropped` counts jobs that were turned away so, `num_failures` those that were ended or took
    the child down.
    """

    def __init__(
        self, timeout_s: float, *, max_waiting: int = 128, memory_bytes: int = 1 << 30
    ) -> None:
        self.num_dropped = 0
        self.num_failures = 0
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._memory_bytes = memory_bytes
        self._waiting: asyncio.Queue[_Call | None] = asyncio.Queue()
        self._child: _Child | None = None
        self._runner: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def start(self) -> None:
        """Make the child ready for every call, which the first ones wait for otherwise."""
        await self._submit("equivalent" if is_available() else "extract", [])

    async def stop(self) -> None:
        """End the child and what it does; calls that wait, and later ones, have no results."""
        self._is_stopped = True
        self._waiting.put_nowait(None)
        if self._child is not None:
            self._child.kill()
        if self._runner is not None:
            await self._runner

    async def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Say of each (gold, answer) whether they are equivalent; None where there is no result."""
        return await self._submit("equivalent", list(pairs))

    async def extract(self, pattern: str, texts: Sequence[str]) -> list[str | None]:
        """Return group 1 of the pattern's last match in each text; None where there is none."""
        return await self._submit("extract", [(pattern, text) for text in texts])

    async def _submit(self, name: str, arguments: list[tuple[str, str]]) -> list[Any]:
        if self._is_stopped or self._waiting.qsize() >= self._max_waiting:
            self.num_dropped += len(arguments)
            return [None] * len(arguments)
        call = _Call(name, arguments, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(call)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await call.results

    async def _run(self) -> None:
        """Serve calls until `stop`; those of callers that are gone cost nothing."""
        while (call := await self._waiting.get()) is not None:
            results = await self._results(call)
            if not call.results.done():
                call.results.set_result(results)
        await self._end_child()

    async def _results(self, call: _Call) -> list[Any]:
        results: list[Any] = []
        if not self._is_stopped:
            await self._ready_child(call.name)
        failures_before = self.num_failures
        for arguments in call.arguments:
            if call.results.done() or self.num_failures - failures_before >= _MAX_FAILURES:
                break
            results.append(await self._result(call.name, arguments))
        return results + [None] * (len(call.arguments) - len(results))

    async def _result(self, name: str, arguments: tuple[str, str]) -> Any:
        child = None if self._is_stopped else await self._ready_child(name)
        if child is None:
            return None
        try:
            return await child.ask(name, arguments, self._timeout_s)
        except (TimeoutError, EOFError, ConnectionError) as error:
            await self._give_up("a job on answers was given up", error)
            return None

    async def _ready_child(self, name: str) -> _Child | None:
        """Return a child that is ready for calls of that name; None when none can be had."""
        try:
            if self._child is None or not self._child.is_alive:
                await self._end_child()
                self._child = await _Child.spawn(self._memory_bytes)
            await self._child.prepare(name)
        except (OSError, TimeoutError, EOFError) as error:
            await self._give_up("the process for answers does not start", error)
        return self._child

    async def _give_up(self, what: str, error: Exception) -> None:
        if not self._is_stopped:
            self.num_failures += 1
            logger.warning("%s: %r", what, error)
        await self._end_child()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()


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
        """Start it, but do not wait for it. OSError when there is no process to be had."""
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
