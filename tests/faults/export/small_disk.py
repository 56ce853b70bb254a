"""A file system of a size that can be changed, seen by this process and its children alone.

A tmpfs in a namespace of mounts of its own: it needs root, or a kernel that lets users have
namespaces. It ends with the process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000


class SmallDisk:
    """Mounted at `folder`, which exists; only for a process with one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _leave_the_namespace()
        _mount("--make-rprivate", "/")
        _mount("-t", "tmpfs", "none", str(folder))

    def used_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def resize(self, size_bytes: int) -> None:
        """Give it a size, not below what is used; in pages."""
        _mount("-o", f"remount,size={size_bytes}", str(self.folder))


def _leave_the_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group, is_root = os.geteuid(), os.getegid(), os.geteuid() == 0
    if libc.unshare(CLONE_NEWNS | (0 if is_root else _CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), "no namespace of mounts: run as root")
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
