"""Real processes for a check: a Tandem server, Prometheus and Alertmanager, on loopback."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.monitoring.load import TASK

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "k8s" / "monitoring" / "rules"
ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")  # Debian's name, and its own
JOB = "tandem"
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 15.0

# What the shipped rules call hours takes seconds here. Nothing else of them changes.
SHORT = {
    "1m": "1s", "2m": "2s", "5m": "4s", "10m": "10s", "15m": "6s", "30m": "12s", "1h": "8s",
    "2h": "10s", "6h": "12s", "1d": "20s", "3d": "30s",
}  # fmt: skip
DURATION = re.compile(r"(?<![\w.])\d+[mhd]\b")
LEAST_COUNT = re.compile(r">= \d+")


class CheckError(Exception):
    """A process did not do what it should; the text says which, and has its log."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one set of processes; free when they were drawn."""

    grpc: int
    control: int
    metrics: int
    prometheus: int
    alertmanager: int

    @classmethod
    def draw(cls) -> Ports:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
        numbers = [listener.getsockname()[1] for listener in sockets]
        for listener in sockets:
            listener.close()
        return cls(*numbers)


def find_alertmanager() -> str | None:
    return next(filter(None, map(shutil.which, ALERTMANAGERS)), None)


def missing_tools() -> list[str]:
    """Return which of Prometheus and Alertmanager are not installed."""
    tools = {"prometheus": shutil.which("prometheus"), ALERTMANAGERS[0]: find_alertmanager()}
    return [name for name, path in tools.items() if path is None]


def shorten(text: str) -> str:
    """Return rules with their durations replaced by those of SHORT; KeyError for another one."""
    return DURATION.sub(lambda match: SHORT[match[0]], text)


def shorten_for_few(text: str) -> str:
    """As `shorten`, and without the least counts below which a ratio has no value."""
    return LEAST_COUNT.sub(">= 1", shorten(text))


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Return the seconds that it took; CheckError when it does not come true in time."""
    started_s = time.monotonic()
    while not is_so():
        if time.monotonic() - started_s > timeout_s:
            raise CheckError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - started_s


@contextmanager
def running(name: str, command: Sequence[str], folder: Path, url: str) -> Iterator[None]:
    """Run a command until the block ends; the block begins when `url` answers."""
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: process.poll() is not None or _answers(url), START_TIMEOUT_S, name)
        if process.poll() is not None:
            raise CheckError(f"{name} ended at its start:\n{log.read_text()}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serving(bundle: Path, ports: Ports, folder: Path) -> Iterator[None]:
    """Run `tandem serve` with every answer shadowed."""
    command = [
        sys.executable, "-m", "tandem", "serve", "--bundle", str(bundle),
        "--port", str(ports.grpc), "--control-port", str(ports.control),
        "--metrics-port", str(ports.metrics), "--shadow-rate", "1",
        "--max-model-len", "256", "--tasks", json.dumps([TASK]),
    ]  # fmt: skip
    with running("tandem", command, folder, f"http://127.0.0.1:{ports.metrics}/metrics"):
        yield


@contextmanager
def prometheus(
    ports: Ports, folder: Path, rewrite: Callable[[str], str] = shorten
) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes the server every second, with the shipped rules, rewritten."""
    folder.mkdir(exist_ok=True)
    for path in RULES.glob("*.yaml"):
        (folder / f"rules-{path.name}").write_text(rewrite(path.read_text()))
    config = folder / "prometheus.yml"
    scrape = {
        "job_name": JOB,
        "static_configs": [{"targets": [f"127.0.0.1:{ports.metrics}"]}],
    }
    target = {"static_configs": [{"targets": [f"127.0.0.1:{ports.alertmanager}"]}]}
    settings = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules-*.yaml"],
        "scrape_configs": [scrape],
        "alerting": {"alertmanagers": [target]},
    }
    config.write_text(yaml.safe_dump(settings))
    url = f"http://127.0.0.1:{ports.prometheus}"
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{ports.prometheus}", "--log.level=warn",
    ]  # fmt: skip
    with running("prometheus", command, folder, f"{url}/-/ready"):
        yield Prometheus(url)


@contextmanager
def alertmanager(ports: Ports, webhook_url: str, folder: Path) -> Iterator[None]:
    """Run an Alertmanager that hands every alert to a webhook after a second."""
    config = folder / "alertmanager.yml"
    settings = {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname"],
            "group_wait": "1s",
            "group_interval": "1s",
        },
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook_url}]}],
    }
    config.write_text(yaml.safe_dump(settings))
    command = [
        find_alertmanager() or ALERTMANAGERS[0], f"--config.file={config}",
        f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address=",
        f"--web.listen-address=127.0.0.1:{ports.alertmanager}", "--log.level=warn",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{ports.alertmanager}/-/ready"
    with running("alertmanager", command, folder, url):
        yield


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Asks a Prometheus over HTTP."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query, of a scalar one; CheckError when it refuses."""
        path = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(path, timeout=10) as answer:
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise CheckError(json.load(error)["error"]) from error
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        series: list[dict[str, Any]] = data["result"]
        return series

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self.query('ALERTS{alertstate="firing"}')
        return {alert["metric"]["alertname"] for alert in alerts}
