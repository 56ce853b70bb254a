"""How a client connects and when it tries again: channel options, retry policy, TLS, the token.

Reads no environment. gRPC retries all calls but synchronous streams: those may never end when every
attempt finds no server (seen in grpcio 1.75 and 1.85, docs/proxy.md). gRPC sends them once, and
`GenerateStream` begins again by `Attempts`, which has the pauses, statuses and budget of
`service_config`.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from serve.addresses import is_loopback, is_unix, parse_unix
from serve.client.failures import PUSHBACK_KEY

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # The server allows pings this often; a dead server is then noticed within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that is back is found within this, and so before the last attempt of a call.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # 64 samples with log-probabilities of both models exceed the default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)
# More than gRPC allows are cut to this by gRPC.
MAX_ATTEMPTS = 5
FIRST_PAUSE_S, PAUSE_FACTOR, MAX_PAUSE_S = 0.2, 5, 10.0
PAUSES_S = tuple(min(FIRST_PAUSE_S * PAUSE_FACTOR**number, MAX_PAUSE_S) for number in range(4))
JITTER = 0.2
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
MAX_TOKENS, TOKEN_RATIO = 1000, 0.1
_MILLISECONDS = re.compile("[0-9]{1,10}")

_INFERENCE, _CONTROL = "tandem.v1.InferenceService", "tandem.v1.ControlService"
# Calls that may be sent again: a request id makes them idempotent, or they only read.
_RETRIED: tuple[dict[str, str], ...] = (
    {"service": _INFERENCE},
    {"service": _CONTROL, "method": "GetStatus"},
    {"service": _CONTROL, "method": "GetPolicy"},
)
# Without Generate, whose synchronous streams `GenerateStream` begins again.
_RETRIED_SYNC: tuple[dict[str, str], ...] = (
    *({"service": _INFERENCE, "method": name} for name in ("Compare", "Score", "GetModels")),
    *_RETRIED[1:],
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of an encrypted connection; ValueError for a certificate without its key.

    `ca` signs the server (none: what gRPC trusts by default); `cert` and `key` are the client's
    own. `server_name` is the name in the server's certificate where it is not the target's, which
    for a Unix socket is localhost.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs its key: give both cert and key, or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; OSError where one cannot be read."""
        ca, key, cert = (
            path.read_bytes() if path else None for path in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how to reach it; ValueError for what could not work or would be unsafe.

    `max_attempts` counts the first one: 1 retries nothing.
    """

    target: str
    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    max_attempts: int = MAX_ATTEMPTS

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(f"max_attempts is {self.max_attempts}; must be 1 to {MAX_ATTEMPTS}")
        if is_unix(self.target):
            parse_unix(self.target)
        if self.token is None:
            return
        if not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("the token must be printable ASCII without spaces or line ends")
        if self.tls is None and not is_local(self.target):
            raise ValueError(
                f"the token would travel to {self.target!r} in clear; give tls, or use a loopback "
                "address"
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def open(self) -> grpc.Channel:
        """Return a channel that connects at its first call; OSError as `Tls.credentials`."""
        options = self._options(_RETRIED_SYNC)
        if self.tls is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.tls.credentials(), options)

    def open_async(self) -> grpc.aio.Channel:
        """Do as `open`, for the running event loop."""
        _keep_grpc_aio()
        options = self._options(_RETRIED)
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, self.tls.credentials(), options)

    def _options(self, retried: tuple[dict[str, str], ...]) -> list[tuple[str, str | int]]:
        options: list[tuple[str, str | int]] = [
            *CHANNEL_OPTIONS,
            ("grpc.service_config", service_config(self.max_attempts, retried)),
        ]
        if is_local(self.target):
            # Through a proxy, a loopback address would be the proxy's own.
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None:
            # gRPC would look for the path of a socket in the certificate.
            name = self.tls.server_name or ("localhost" if is_unix(self.target) else None)
            if name is not None:
                options.append(("grpc.ssl_target_name_override", name))
        return options


def service_config(max_attempts: int, retried: tuple[dict[str, str], ...] = _RETRIED) -> str:
    """Return gRPC's service config as JSON: spread over all addresses, and retry within a budget.

    Retried are UNAVAILABLE and RESOURCE_EXHAUSTED, behind the server's grpc-retry-pushback-ms or
    else a pause of 0.2, 1, 5 and 10 s (each ± 20 %), before the first response and within the
    deadline. A request above 256 KiB is sent once, as gRPC keeps no more of it. The budget, per
    target and process: a failed attempt takes 1 of 1000 tokens, a success gives 0.1 back, and
    retries stop at 500 (gRFC A6). docs/proxy.md says what that is enough for.
    """
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if max_attempts > 1:
        policy = {
            "maxAttempts": max_attempts,
            "initialBackoff": f"{FIRST_PAUSE_S:g}s",
            "maxBackoff": f"{MAX_PAUSE_S:g}s",
            "backoffMultiplier": PAUSE_FACTOR,
            "retryableStatusCodes": [code.name for code in RETRIED],
        }
        config["methodConfig"] = [{"name": retried, "retryPolicy": policy}]
        config["retryThrottling"] = {"maxTokens": MAX_TOKENS, "tokenRatio": TOKEN_RATIO}
    return json.dumps(config)


def is_local(target: str) -> bool:
    """Say whether a gRPC target stays on this machine; for a name that is only `localhost`.

    >>> [is_local(t) for t in ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/tandem")]
    [True, True, True, True]
    >>> [is_local(t) for t in ("dns:///localhost:1", "ipv4:127.0.0.1:1,127.0.0.2:1")]
    [True, True]
    >>> [is_local(t) for t in ("example.com:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "dns:///10.0.0.1")]
    [False, False, False]
    """
    if is_unix(target):
        return True
    addresses = re.sub(r"^(dns:(//[^/]*/)?|ipv[46]:)", "", target)
    return all(is_loopback(_host(address)) for address in addresses.split(","))


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # More than one colon: an IPv6 address without a port.
    return address.partition(":")[0] if address.count(":") == 1 else address


@cache
def _keep_grpc_aio() -> None:
    """Keep grpc.aio in this process: else its last channel takes it down, the next one builds it.

    That costs memory each time, and taking it down may wait for ever for its own thread: it did in
    the thirtieth of a process's event loops.
    """
    grpc.aio.init_grpc_aio()


class RetryBudget:
    """Of one client, for all its threads: a failure takes a token, a success gives a part back.

    Below half of the tokens nothing is retried. Source: gRFC A6, "Throttling Retry Attempts".
    """

    def __init__(self, max_tokens: float = MAX_TOKENS) -> None:
        self._max_tokens = self._tokens = max_tokens
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self._tokens + TOKEN_RATIO, self._max_tokens)

    def failed(self) -> bool:
        """Count a failed attempt, and say whether there may be another one."""
        with self._lock:
            self._tokens = max(self._tokens - 1, 0)
            return self._tokens > self._max_tokens / 2


class Attempts:
    """The attempts of one call: at most `max_attempts`, the first one included, in `timeout_s`."""

    def __init__(self, max_attempts: int, budget: RetryBudget, timeout_s: float | None) -> None:
        self._pauses: Iterator[float] = iter(PAUSES_S[: max_attempts - 1])
        self._budget = budget
        self._deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        """Seconds that the next attempt may take; None without a limit."""
        left_s = max(self._deadline_s - time.monotonic(), 0.0)
        return left_s if math.isfinite(left_s) else None

    def succeeded(self) -> None:
        self._budget.succeeded()

    def pause_s(self, error: grpc.RpcError) -> float | None:
        """Return the seconds until the next attempt, no more than are left; None for no other one.

        The server's own wish goes before our pause. A negative one means never, and so does what
        is no number of milliseconds, or one that no clock can wait for.
        """
        if error.code() not in RETRIED or not self._budget.failed():
            return None
        pause_s = next(self._pauses, None)
        if pause_s is None:
            return None
        metadata: Any = error.trailing_metadata() or ()
        wished_ms = dict(metadata).get(PUSHBACK_KEY)
        if wished_ms is None:
            pause_s *= random.uniform(1 - JITTER, 1 + JITTER)
        elif _MILLISECONDS.fullmatch(wished_ms):
            pause_s = int(wished_ms) / 1e3
        else:
            return None
        left_s = self.left_s
        return pause_s if left_s is None else min(pause_s, left_s)
