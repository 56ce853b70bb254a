"""Work on its way to an engine: counted, refused where there is too much, and handed over."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from serve.errors import EngineStoppedError, QueueFullError

RETRY_AFTER_S = 1.0

Command = Callable[[], None]


class Intake:
    """Counts the samples and scoring requests of an engine from `take` to `release`.

    `run` and `wait` are for the engine's thread, which runs the commands; the rest is thread-safe.
    """

    def __init__(self, name: str, max_num_seqs: int, max_waiting: int) -> None:
        self._name = name
        self._max_num_seqs = max_num_seqs
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.num_admitted = 0
        self.is_closed = False

    def take(self, count: int, command: Command) -> None:
        """Count new work and hand it over. Raises QueueFullError, EngineStoppedError."""
        with self._lock:
            self.check_room(count)
            self.num_admitted += count
            self._commands.put(command)

    def check_room(self, count: int) -> None:
        """Raise as `take`; without its lock it says what was so a moment ago."""
        if self.is_closed:
            raise EngineStoppedError(f"the {self._name} engine is stopping")
        if self.num_admitted + count > self._max_waiting + self._max_num_seqs:
            raise QueueFullError(
                f"the {self._name} queue holds {self.num_admitted} sequences and takes at "
                f"most {self._max_waiting} beyond the {self._max_num_seqs} that run",
                RETRY_AFTER_S,
            )

    def release(self) -> None:
        """Count one less."""
        with self._lock:
            self.num_admitted -= 1

    def tell(self, command: Command) -> None:
        """Hand over what is no new work, also to an engine that stops."""
        self._commands.put(command)

    def close(self) -> None:
        """Take nothing more, and wake the engine."""
        with self._lock:
            self.is_closed = True
        self._commands.put(lambda: None)

    def run(self) -> None:
        """Run the commands that are there."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def wait(self) -> None:
        """Run the next command, when it comes."""
        self._commands.get()()
