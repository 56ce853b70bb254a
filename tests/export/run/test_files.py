from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from export.run.files import DiskError, writing_to

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"
COPY = ("/a/x", "/b/x", "[Errno 28] No space left on device: '/a/x' -> '/b/x'")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space"), r"{folder} cannot be written: No space left on device"),
        (OSError(errno.EDQUOT, "x", "/a/b"), r"/a/b cannot be written: Disk quota exceeded \("),
        (OSError(errno.EROFS, "x"), r"{folder} cannot be written: Read-only file system"),
        (
            PermissionError(errno.EACCES, "x"),
            r"{folder} cannot be written: Permission denied .* make it a folder that you may write",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "x", "/a/b"),
            r"/a/b cannot be written: Not a directory",
        ),
        (
            SafetensorError(FULL),
            r"{folder} cannot be written: No space left on device \([\d.]+ MiB",
        ),
    ],
)
def test_writing_that_fails_names_the_folder_and_why(
    tmp_path: Path, error: Exception, text: str
) -> None:
    folder = tmp_path / "run" / "stage"  # may not be there yet
    with pytest.raises(DiskError, match=text.format(folder=folder)), writing_to(folder):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "x"),
        shutil.Error([("/a/x", "/b/x", "[Errno 2] No such file or directory")]),
        SafetensorError("header too large"),
        KeyError("x"),
    ],
)
def test_writing_lets_another_error_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing_to(tmp_path):
        raise error
    assert caught.value is error
