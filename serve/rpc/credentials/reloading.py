"""What was loaded from files and follows them while the server runs: tokens, certificates."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from bundle.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of one file: device, inode, size in bytes, time of the last change in ns. None: there is none.
_Stamp = tuple[int, int, int, int] | None


class Reloaded(Generic[T]):
    """A value that is loaded again when one of its files changes; safe to use from any thread.

    A change that cannot be loaded is logged once, and the value from before stays.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], T],
        *,
        min_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load for the first time; its errors are passed on.

        `load` raises UserError alone. The files are looked at every `min_interval_s` at most.
        """
        self._paths = paths
        self._load = load
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._is_looking = threading.Lock()
        self._looked_s = clock()
        # Stamped before they are read: what changes meanwhile is seen at the next look.
        self._stamps = self._stamp()
        self._value = load()

    def current(self) -> T:
        """Return the newest value that could be loaded; does not wait for another thread's look."""
        if self._is_looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._is_looking.release()
        return self._value

    def _look(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < self._min_interval_s:
            return
        self._looked_s = now_s
        stamps = self._stamp()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self._value = self._load()
        except UserError as error:
            logger.error("%s; what was loaded before stays in use", error)
        else:
            logger.info("loaded again: %s", ", ".join(map(str, self._paths)))

    def _stamp(self) -> list[_Stamp]:
        return [_stamp_of(path) for path in self._paths]


def _stamp_of(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
