"""What people see of an export: tables, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def open_console() -> Console:
    """Return the console that tables are printed on: in a file 120 columns wide."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


class ConsoleReporter:
    """A live bar on a terminal; elsewhere a line now and then, so that a log shows progress."""

    _LINE_EVERY_S = 10.0

    def __init__(
        self, *, is_quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._started_s = clock()
        self._is_quiet = is_quiet
        self._bars: list[Progress] = []

    def say(self, message: str) -> None:
        if not self._is_quiet:
            print(f"[{self._clock() - self._started_s:5.0f} s] {message}", flush=True)

    def track(self, label: str) -> Callable[[int, int], None]:
        """See `export.run.stages.RunReporter`."""
        if self._is_quiet or not sys.stdout.isatty():
            return self._lines(label)
        return self._bar(label)

    def close(self) -> None:
        """Give the terminal its cursor back, where a bar did not come to its end."""
        for bar in self._bars:
            bar.stop()

    def _bar(self, label: str) -> Callable[[int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        progress = Progress(
            "          {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        task = progress.add_task(label)
        self._bars.append(progress)

        def show(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.stop()

        return show

    def _lines(self, label: str) -> Callable[[int, int], None]:
        last_s = self._clock()

        def show(done: int, total: int) -> None:
            nonlocal last_s
            if done == total or self._clock() - last_s >= self._LINE_EVERY_S:
                last_s = self._clock()
                self.say(f"  {label}: {done} of {total}")

        return show
