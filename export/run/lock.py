"""One process at a time in a folder: two that build the same stage take files from each other.

The kernel keeps the lock and lets go of it with the process, however that ends. On a network file
system the server may hold it a while longer when a machine is lost, so others wait some time.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from export.run.errors import ExportError

# NFS servers give up a lost client's locks after 90 s.
MAX_WAIT_S = 100.0
_POLL_S = 0.5


class FolderInUseError(ExportError):
    """Another process builds in the folder; the text names it."""


@contextmanager
def sole_user(
    folder: Path, announce: Callable[[str], None], max_wait_s: float = MAX_WAIT_S
) -> Iterator[None]:
    """Have the folder to itself during the block; the lock is a file beside it.

    Raises:
        FolderInUseError: another process still has it after `max_wait_s`.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as file:
        _wait_for(file, folder, announce, max_wait_s)
        with suppress(OSError):  # a full disk: the name is for people, the lock is the kernel's
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def _wait_for(
    file: IO[str], folder: Path, announce: Callable[[str], None], max_wait_s: float
) -> None:
    until_s, is_announced = time.monotonic() + max_wait_s, False
    while not _try(file):
        file.seek(0)
        owner = file.read() or "another process"
        if time.monotonic() >= until_s:
            raise FolderInUseError(
                f"{folder} is in use by {owner}: wait for it to end, or give another output_dir"
            )
        if not is_announced:
            announce(f"{owner} builds in {folder}; waiting {max_wait_s:.0f} s at most")
            is_announced = True
        time.sleep(_POLL_S)


def _try(file: IO[str]) -> bool:
    """Take the lock if nobody has it; True, too, where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
