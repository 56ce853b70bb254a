"""gRPC's own log lines, at most one a second: whoever can connect makes as many as he likes.

Nothing here imports gRPC: its core reads its settings as it is loaded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, MutableMapping

# The Python layer's: three tracebacks for one header that is not UTF-8, before any check of ours.
LOGGER = "grpc._cython.cygrpc"
_PERIOD_S = 1.0


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
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(found, OncePerSecond) for found in logger.filters):
        logger.addFilter(OncePerSecond())
