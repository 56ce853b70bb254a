"""gRPC's own log lines, at most one a second: whoever can connect makes as many as he likes.

`quiet_grpc` comes before gRPC is imported: its core reads its settings as it is loaded.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

# The Python layer's: three tracebacks for one header that is not UTF-8, before any check of ours.
LOGGER = "grpc._cython.cygrpc"
_PERIOD_S = 1.0

logger = logging.getLogger(LOGGER)


class OncePerSecond(logging.Filter):
    """Lets a record through each second, which says how many were left out before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next_s = clock()
        self._num_dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = self._clock()
        if now_s < self._next_s:
            self._num_dropped += 1
            return False
        self._next_s = now_s + _PERIOD_S
        if self._num_dropped:
            record.msg = f"{record.getMessage()} ({self._num_dropped} more were not logged)"
            record.args = ()
        self._num_dropped = 0
        return True


def quiet_grpc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Bound what gRPC logs; call it before grpc is imported.

    The core writes to stderr past every logger, a line for each malformed header. So it says
    nothing, unless GRPC_VERBOSITY is set.
    """
    environ.setdefault("GRPC_VERBOSITY", "NONE")
    if not any(isinstance(found, OncePerSecond) for found in logger.filters):
        logger.addFilter(OncePerSecond())


class _Logged:
    """Stands for the module `traceback`: what would be printed is logged."""

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)

    def print_exc(self) -> None:
        logger.warning("gRPC could not tell a client that its call failed", exc_info=True)


def quiet_grpc_tracebacks() -> None:
    """Have gRPC log, and thereby bound, the one traceback that it prints to stderr.

    It is of a call that failed in gRPC itself and whose client had gone: a path that is not UTF-8,
    and a reset, are enough for a dozen lines.
    """
    from grpc._cython import cygrpc  # type: ignore[attr-defined]

    cygrpc.traceback = _Logged()
