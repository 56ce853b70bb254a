"""How far a run is, on stderr: a bar on a terminal, elsewhere a line per tenth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[float, float], None]


class ProgressReporter:
    """Tells people what a run does. `say` a line, or `track` what is done by and by."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def say(self, message: str) -> None:
        elapsed_s = time.monotonic() - self._started_s
        print(f"[{elapsed_s:5.0f} s] {message}", file=sys.stderr, flush=True)

    @contextmanager
    def track(self, label: str) -> Iterator[OnProgress]:
        """Yield a function that takes how much is done, and of how much."""
        if sys.stderr.isatty():
            with _bar(label) as on_progress:
                yield on_progress
        else:
            yield self._lines(label)

    def _lines(self, label: str) -> OnProgress:
        num_tenths = 0

        def on_progress(done: float, total: float) -> None:
            nonlocal num_tenths
            reached = int(10 * done / total) if total else 10
            if reached > num_tenths:
                num_tenths = reached
                self.say(f"{label}: {10 * reached} %")

        return on_progress


@contextmanager
def _bar(label: str) -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)
