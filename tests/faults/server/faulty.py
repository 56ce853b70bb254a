"""Models that break as they are told to, and a log that does not tell of each expected failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.faults.paced import PacedBackend
from tests.support.backends import Pass

Break = Callable[["FaultyBackend"], None]


class DeathOfThread(BaseException):
    """What nothing in an engine's loop catches."""


class FaultyBackend(PacedBackend):
    """Does `fault` instead of the pass, from pass number `first_pass` behind the next `arm` on."""

    pass_s = 0.001

    def __init__(self, *, max_num_seqs: int = 4, max_model_len: int = 64) -> None:
        super().__init__(max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self.may_go_on = threading.Event()
        self.broke_s: list[float] = []
        self._fault: Break | None = None
        self._num_passes_left = 0

    def arm(self, fault: Break | None, first_pass: int = 0) -> None:
        self._num_passes_left = first_pass
        self._fault = fault

    def before_pass(self, first_row: int, rows: Pass) -> None:
        if self._fault is not None:
            self._num_passes_left -= 1
            if self._num_passes_left < 0:
                self.broke_s.append(time.monotonic())
                self._fault(self)
        super().before_pass(first_row, rows)


def fail(backend: FaultyBackend) -> None:
    raise RuntimeError("the device is lost")


def fail_once(backend: FaultyBackend) -> None:
    backend.arm(None)
    raise RuntimeError("a pass went wrong")


def kill_thread(backend: FaultyBackend) -> None:
    raise DeathOfThread


def hang(backend: FaultyBackend) -> None:
    assert backend.may_go_on.wait(300), "a row forgot to end a hang"
    raise DeathOfThread


@contextmanager
def quiet_log() -> Iterator[None]:
    """Keep the server's log, which has a traceback of each failure, to itself."""
    logger = logging.getLogger("serve")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
