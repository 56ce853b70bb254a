"""The server's metrics while a run goes on: its gauges over time, and whether it began anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

from bundle.errors import UserError
from loadtest.server_metrics import Scrape, scrape, why_restarted

# How often the server is asked: a scrape takes it 5 to 30 ms.
INTERVAL_S = 2.0
_GAUGES = {
    "waiting": "tandem_sequences_waiting",
    "running": "tandem_sequences_running",
    "batch": "tandem_batch_size",
}


class ServerWatch:
    """Reads a server's metrics before a load, during it on a thread of its own, and behind it.

    `timeline` has the gauges by role, `before` and `after` are the first and the last scrape; the
    latter is None where the metrics were gone. `notes` say what went wrong with the server.
    """

    def __init__(self, url: str, read: Callable[[str], Scrape] = scrape) -> None:
        """Read the metrics. UserError: they cannot be had."""
        self.timeline: dict[str, list[dict[str, float]]] = {}
        self.after: Scrape | None = None
        self.is_restarted = False
        self.notes: list[str] = []
        self._url, self._read = url, read
        self.before = self._last = read(url)
        self._start_s: float | None = None
        self._num_failed = 0
        self._is_over = Event()
        self._thread = Thread(target=self._read_on, name="gauges", daemon=True)

    def set_start(self, start_s: float) -> None:
        """Tell when the run's clock began, on `time.monotonic`."""
        self._start_s = start_s

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Read the metrics a last time."""
        self._is_over.set()
        self._thread.join()
        try:
            self.after = self.look()
        except UserError as error:
            self.notes.append(f"the server's metrics were gone behind the load: {error}")
        if self._num_failed:
            self.notes.append(
                f"the server's metrics could not be read {self._num_failed} times during the load"
            )

    def look(self) -> Scrape:
        """Read the metrics, and note a server that began anew. UserError: they cannot be had."""
        found = self._read(self._url)
        if why := why_restarted(self._last, found):
            self.is_restarted = True
            self.notes.append(f"the server began anew during the load: {why}")
        self._last = found
        return found

    def _read_on(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            try:
                found = self.look()
            except UserError:
                self._num_failed += 1
                continue
            if self._start_s is not None:
                self._take(found, time.monotonic() - self._start_s)

    def _take(self, found: Scrape, time_s: float) -> None:
        for labels in found.of(_GAUGES["running"]):
            role = dict(labels)["role"]
            values = {
                name: sum(found.of(metric, role=role).values()) for name, metric in _GAUGES.items()
            }
            self.timeline.setdefault(role, []).append({"time_s": time_s, **values})
