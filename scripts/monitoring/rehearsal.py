"""The alert that matters, for real: a student is replaced by a damaged one, and somebody is told.

A server of the good student under load, a Prometheus with the shipped rules, an Alertmanager, and a
webhook. First nothing fires; then the server is restarted on its ports with the damaged student, as
a rollout would, and the seconds until the webhook hears of it are taken.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from scripts.monitoring.load import ShadowedLoad
from scripts.monitoring.processes import (
    CheckError,
    Ports,
    Prometheus,
    alertmanager,
    prometheus,
    serving,
    wait_until,
)

ALERT = "TandemKlDrift"
QUIET_S = 10.0
# Twice what is promised (a minute): on a machine that does other work everything takes longer.
JUDGED_TIMEOUT_S, DELIVERED_TIMEOUT_S = 90.0, 120.0
# Both sides of the alert's comparison: until they have values, quiet means nothing.
JUDGED = ("tandem:kl_k3_nats:mean30m", "tandem:kl_k3_nats:baseline1d")


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How long the good student was judged and found good, and how long the damaged one took.

    `started_s`, `fired_s` and `delivered_s` count from the end of the good server: until the
    damaged one answers, the alert fires, and the webhook has it, which was then told `alert`.
    """

    quiet_s: float
    started_s: float
    fired_s: float
    delivered_s: float
    alert: dict[str, Any]

    def describe(self) -> str:
        return (
            f"{ALERT}: quiet for {self.quiet_s:.0f} s, then server {self.started_s:.1f} s, "
            f"fired {self.fired_s:.1f} s, delivered {self.delivered_s:.1f} s after the swap"
        )


class Webhook:
    """What an Alertmanager delivered: alerts in the order of their arrival."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.alerts: list[dict[str, Any]] = []

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the first alert of that name that was told to be firing."""
        return next(
            (
                alert
                for alert in self.alerts
                if alert["labels"]["alertname"] == name and alert["status"] == "firing"
            ),
            None,
        )


@contextmanager
def receiving() -> Iterator[Webhook]:
    """Listen on a free port, as the service that wakes somebody would."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            webhook.alerts += json.loads(body)["alerts"]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        webhook = Webhook(f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield webhook
        finally:
            server.shutdown()
            thread.join()


def rehearse(
    good: Path,
    damaged: Path,
    folder: Path,
    meanwhile: Callable[[Ports], None] = lambda ports: None,
) -> Rehearsal:
    """Serve `good`, then `damaged`; `meanwhile` is called while the good one is under load.

    Raises:
        CheckError: the alert fired on the good student, or not in time on the damaged one.
    """
    ports = Ports.draw()
    with ExitStack() as stack:
        webhook = stack.enter_context(receiving())
        stack.enter_context(alertmanager(ports, webhook.url, folder))
        watcher = stack.enter_context(prometheus(ports, folder))
        with serving(good, ports, folder), ShadowedLoad(f"127.0.0.1:{ports.grpc}"):
            meanwhile(ports)
            quiet_s = watch_quiet(watcher, webhook)
        swapped_s = time.monotonic()
        with serving(damaged, ports, folder), ShadowedLoad(f"127.0.0.1:{ports.grpc}"):
            started_s = time.monotonic() - swapped_s
            wait_until(lambda: ALERT in watcher.firing(), DELIVERED_TIMEOUT_S, f"{ALERT} fires")
            fired_s = time.monotonic() - swapped_s
            wait_until(
                lambda: webhook.find(ALERT) is not None,
                DELIVERED_TIMEOUT_S,
                f"{ALERT} at the webhook",
            )
            delivered_s = time.monotonic() - swapped_s
        alert = webhook.find(ALERT)
        assert alert is not None, "it has just been found"
        return Rehearsal(quiet_s, started_s, fired_s, delivered_s, alert)


def watch_quiet(watcher: Prometheus, webhook: Webhook) -> float:
    """Return how long the alert had all it needs, and did not fire."""
    wait_until(
        lambda: all(watcher.query(record) for record in JUDGED),
        JUDGED_TIMEOUT_S,
        f"{' and '.join(JUDGED)} have values",
    )
    judged_s = time.monotonic()
    while time.monotonic() - judged_s < QUIET_S:
        if ALERT in watcher.firing() or webhook.find(ALERT):
            raise CheckError(f"{ALERT} fired on the good student")
        time.sleep(0.5)
    return time.monotonic() - judged_s
