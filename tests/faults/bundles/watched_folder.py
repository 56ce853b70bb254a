"""What happens to a folder meanwhile, by inotify: also what native code opens is seen."""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

# IN_ACCESS, IN_MODIFY, IN_OPEN, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE
_READ_OR_WRITTEN = 0x1 | 0x2 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200
_NON_BLOCKING = 0o4000


class WatchedFolder(AbstractContextManager["WatchedFolder"]):
    """Counts files of a folder that anyone opens, reads, writes, adds or removes."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(_NON_BLOCKING)
        path = os.fsencode(folder)
        watch = libc.inotify_add_watch(self._descriptor, path, _READ_OR_WRITTEN)
        if self._descriptor < 0 or watch < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot watch", str(folder))

    def num_bytes_of_events(self) -> int:
        """Return how much inotify has told since the last call; 0: nobody was there."""
        try:
            return len(os.read(self._descriptor, 1 << 16))
        except BlockingIOError:
            return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
