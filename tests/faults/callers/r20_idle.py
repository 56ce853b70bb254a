"""Stuck scrapers of /metrics and 500 idle connections: the data plane's p99 at most 1.1 times.

Half of the idle connections never say a word, the others are silent behind the preface of HTTP/2.
More scrapers than the server keeps send half a request, or a whole one and take no answer; whoever
is thrown out comes again. A good scraper still gets its answer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from serve.http.server import MAX_CONNECTIONS
from tests.faults.callers.latency import NUM_TEMPLATES, Rounds, bystanders, compare_waits
from tests.faults.paced import PacedBackend
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig

NUM_IDLE = 500
NUM_SCRAPERS = 2 * MAX_CONNECTIONS
# The target is of p99. What the tests can tell in a second, on a busy machine, is a blocked loop.
ROUNDS = {Size.CI: Rounds(1, 3, 60, 50, 2.5), Size.FULL: Rounds(20, 20, 400, 99, 1.1)}
MAX_SCRAPE_S = 5.0


class IdleConnections:
    """Connections that cost a server's attention and want nothing, of a process of their own."""

    def __init__(self, rig: Rig, result: RowResult) -> None:
        self._rig = rig
        self._addresses = [rig.server.address, urlsplit(rig.server.metrics_url).netloc]
        self._url = rig.server.metrics_url
        self._result = result
        self.max_scrape_s = 0.0

    @contextmanager
    def present(self) -> Iterator[None]:
        """Keep all of them during the block, and have one good scrape at its end."""
        numbers = [str(NUM_IDLE), str(NUM_SCRAPERS)]
        command = [
            sys.executable,
            "-m",
            "tests.faults.callers.idle_connections",
            *self._addresses,
            *numbers,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as idle:
            assert idle.stdout is not None
            said = idle.stdout.readline()
            self._result.demand(said == "here\n", f"not all could connect: {said!r}")
            # The server has then taken all of them in, and what is measured is that they stay.
            self._rig.run(self._ask_once())
            yield
            self._scrape()
            self._result.demand(idle.poll() is None, "the idle connections did not stay to the end")
            idle.kill()

    async def _ask_once(self) -> None:
        await self._rig.client.generate(next(bystanders(1))).result()

    def _scrape(self) -> None:
        started_s, got = time.monotonic(), b""
        with suppress(OSError), urllib.request.urlopen(self._url, timeout=2 * MAX_SCRAPE_S) as page:
            got = page.read()
        self.max_scrape_s = max(self.max_scrape_s, time.monotonic() - started_s)
        self._result.demand(b"tandem_requests_total" in got, "a good scrape got no metrics")


def run(size: Size) -> RowResult:
    """Measure requests beside the idle connections, and without them."""
    result = RowResult("R20", "stuck scrapers, 500 idle connections")
    with (
        tempfile.TemporaryDirectory() as name,
        Rig(Path(name), max_replays=0, make_backend=PacedBackend) as rig,
    ):
        reference = rig.drive(bystanders(NUM_TEMPLATES), "reference")
        idle = IdleConnections(rig, result)
        others, waits = compare_waits(rig, ROUNDS[size], idle.present, "others")
        result.add(rig.ledger(others, reference))
        result.leaks = rig.leaks()
    result.measured |= {
        "num_idle": NUM_IDLE,
        "num_scrapers": NUM_SCRAPERS,
        "max_scrape_s": idle.max_scrape_s,
    }
    took = f"a good scrape took {idle.max_scrape_s:.1f} s"
    result.demand(idle.max_scrape_s <= MAX_SCRAPE_S, took, is_timed=True)
    waits.judge(result)
    return result
