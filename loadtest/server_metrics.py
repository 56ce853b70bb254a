"""A server's metrics as it is asked for them: once, or while a load goes on.

What a scrape says is held against the client's records by `loadtest.analysis.cross_check`.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event, Thread

from prometheus_client.parser import text_string_to_metric_families

from bundle.errors import UserError

# How often the server is asked during a load: a scrape takes it 5 to 30 ms.
INTERVAL_S = 2.0
_TIMEOUT_S = 10.0
_GAUGES = {
    "waiting": "tandem_sequences_waiting",
    "running": "tandem_sequences_running",
    "batch": "tandem_batch_size",
}
# Counters: they fall where the server began anew, and nowhere else.
_COUNTERS = ("_total", "_bucket", "_count")

Labels = frozenset[tuple[str, str]]
Series = Mapping[tuple[str, Labels], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of a text exposition, by name and labels."""

    values: Series

    def of(self, name: str, **labels: str) -> dict[Labels, float]:
        """Return the series of a name that have these labels."""
        wanted = labels.items()
        return {
            found: value
            for (series, found), value in self.values.items()
            if series == name and wanted <= found
        }

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the series of a name that have these labels; 0 without any."""
        return sum(self.of(name, **labels).values())


def scrape(url: str) -> Scrape:
    """Read a server's metrics; UserError when they cannot be had."""
    hint = "write http://HOST:PORT/metrics"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: {hint}")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
            page = reply.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        told = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{url}: {told}; {hint}") from None
    try:
        found = parse(page.decode("utf-8"))
    except ValueError:
        found = Scrape({})
    if not any(name.startswith("tandem_") for name, _ in found.values):
        raise UserError(f"{url}: no Tandem metrics are there; {hint}")
    return found


def why_restarted(before: Scrape, after: Scrape) -> str:
    """Return which counter fell between two scrapes, as it does where the server began anew; or "".

    >>> old, new = parse("x_total 7"), parse("x_total 2")
    >>> why_restarted(old, new), why_restarted(new, old)
    ('x_total fell from 7 to 2', '')
    """
    for (name, labels), value in before.values.items():
        if name.endswith(_COUNTERS) and (now := after.values.get((name, labels), 0.0)) < value:
            shown = ",".join(f'{key}="{each}"' for key, each in sorted(labels))
            series = f"{name}{{{shown}}}" if shown else name
            return f"{series} fell from {value:g} to {now:g}"
    return ""


def parse(text: str) -> Scrape:
    """Return the samples of a text exposition. ValueError: it is none."""
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


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
        try:
            self.before = self._last = read(url)
        except UserError as error:
            raise UserError(f"--metrics-url {error}") from None
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
            values = {name: found.total(metric, role=role) for name, metric in _GAUGES.items()}
            self.timeline.setdefault(role, []).append({"time_s": time_s, **values})
