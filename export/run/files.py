"""JSON files, and a disk that is full: an error that says where, which most writers do not."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from export.run.errors import ExportError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_NOT_ALLOWED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})
_CANNOT_WRITE = _FULL | _NOT_ALLOWED


class DiskError(ExportError):
    """A folder cannot be written; the text names it, and says what is kept."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Name the folder, or the file in it, that the block could not write; DiskError.

    Other errors pass as they are.
    """
    try:
        yield
    except shutil.Error as error:  # of copytree: source, target and what was said, for each file
        found = [(target, _number_in(said, "[Errno {}]")) for _, target, said in error.args[0]]
        full = [(target, number) for target, number in found if number is not None]
        if not full:
            raise
        raise _disk_error(*full[0], folder) from error
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        assert error.errno is not None
        path = error.filename2 or error.filename or folder  # of a renaming, what it was to become
        raise _disk_error(path, error.errno, folder) from error
    except SafetensorError as error:
        number = _number_in(str(error), "(os error {})")
        if number is None:
            raise
        raise _disk_error(folder, number, folder) from error


def _number_in(text: str, form: str) -> int | None:
    """Return the number of an error of the system that was made a text."""
    return next((number for number in _CANNOT_WRITE if form.format(number) in text), None)


def _disk_error(path: object, number: int, folder: Path) -> DiskError:
    remedy = "make room" if number in _FULL else "make it a folder that you may write to"
    return DiskError(
        f"{path} cannot be written: {os.strerror(number)} ({_free(folder)}); what is finished is "
        f"kept: {remedy} and start the same command again"
    )


def _free(folder: Path) -> str:
    """Return how much room there is, by the nearest folder that exists."""
    folders = (folder, *folder.absolute().parents)
    # Path.exists raises below a folder that may not be entered.
    existing = next(path for path in folders if os.path.exists(path))  # noqa: PTH110
    free = os.statvfs(existing)
    return f"{free.f_bavail * free.f_frsize / 2**20:.1f} MiB free"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
