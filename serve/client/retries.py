"""When a synchronous stream is begun again: gRPC's own rules, kept here because its streams hang.

grpcio's synchronous streams that gRPC retries may never end when every attempt finds no server
(seen in 1.75 and 1.85, docs/proxy.md). So gRPC sends them once, and `GenerateStream` begins again,
by the same pauses, statuses and budget as `serve.client.channel.service_config` gives all other
calls.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from serve.client.failures import PUSHBACK_KEY

FIRST_PAUSE_S, PAUSE_FACTOR, MAX_PAUSE_S = 0.2, 5, 10.0
PAUSES_S = tuple(min(FIRST_PAUSE_S * PAUSE_FACTOR**number, MAX_PAUSE_S) for number in range(4))
JITTER = 0.2
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
MAX_TOKENS, TOKEN_RATIO = 1000, 0.1
_MILLISECONDS = re.compile("[0-9]{1,10}")


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
