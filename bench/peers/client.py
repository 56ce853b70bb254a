"""The parent's end of a worker: start, ask, and stop its whole process group while others measure.

A stopped worker burns no core, whatever its thread pools do between two runs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.peers.environments import last_words
from bench.peers.machine import process_cpu_s

LOAD_TIMEOUT_S = 900.0
REQUEST_TIMEOUT_S = 300.0
REPOSITORY = Path(__file__).parents[2]


class WorkerFailedError(Exception):
    """A worker ended or did not answer in time; the text has the last line of its log."""


class Worker:
    """One process that runs `bench.peers.worker`, stopped unless it answers a request."""

    def __init__(self, python: Path, module: str, log: Path, variables: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-m", "bench.peers.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=REPOSITORY,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        self.peak_memory_bytes = 0

    def load(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model; returns `versions` and `load_s`. Raises WorkerFailedError."""
        return self._request({"op": "load", "options": options}, LOAD_TIMEOUT_S)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        """Return the seconds of one run. Raises WorkerFailedError."""
        request = {"op": "generate", "prompts": prompts, "max_tokens": max_tokens}
        return float(self._request(request, REQUEST_TIMEOUT_S)["seconds"])

    def write_logits(self, chats: Sequence[tuple[Sequence[int], int]], path: Path) -> None:
        """Have the answers' logits saved. Raises WorkerFailedError."""
        request = {"op": "logits", "chats": chats, "path": str(path.absolute())}
        self._request(request, REQUEST_TIMEOUT_S)

    def cpu_s(self) -> float:
        """Return the CPU time that the worker's threads have used so far."""
        return process_cpu_s(self._process.pid)

    def close(self) -> None:
        """End the process group, however it is."""
        for number in (signal.SIGKILL, signal.SIGCONT):
            self._signal(number)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a request that nobody read
                pipe.close()

    def _request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        with self._running():
            line = self._exchange(json.dumps(request).encode() + b"\n", timeout_s)
            if not line:
                self._process.wait()  # here: a stopped process would never end
                raise WorkerFailedError(last_words(self._log))
        reply: dict[str, Any] = json.loads(line)
        self.peak_memory_bytes = reply.pop("peak_memory_bytes")
        return reply

    def _exchange(self, message: bytes, timeout_s: float) -> bytes:
        """Return the reply, empty when the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(message)
            stdin.flush()
        except BrokenPipeError:
            return b""
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise WorkerFailedError(f"no answer within {timeout_s:g} s; {last_words(self._log)}")
        return stdout.readline()

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        # Until `wait`, a process that ended keeps its id; its group may be gone with it.
        if self._process.returncode is None:
            os.killpg(self._process.pid, number)
