"""What a stage used: peak memory of this process and its children, bytes on disk."""

from __future__ import annotations

import resource
from collections.abc import Container
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): reset the peak resident set size


class PeakMemory:
    """The peak resident memory from now on; of the whole process where Linux cannot reset it.

    `proc` is where Linux tells of this process.
    """

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._children_bytes = _children_peak_bytes()
        if (proc / "clear_refs").exists():
            try:
                (proc / "clear_refs").write_text(_RESET_PEAK)
            except OSError:
                # A container may forbid it; the peak is then the process's, which is no less.
                return

    def read_bytes(self) -> int:
        """Return the larger one of this process's peak and that of a child that ended since."""
        children = _children_peak_bytes()
        return max(
            _read_status(self._proc, "VmHWM"), children if children > self._children_bytes else 0
        )


def resident_bytes() -> int:
    """Return the resident memory of this process now; its peak where there is no /proc."""
    return _read_status(_PROC, "VmRSS")


def _read_status(proc: Path, key: str) -> int:
    if (proc / "status").exists():
        for line in (proc / "status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _children_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def folder_size_bytes(folder: Path, without: Container[str] = ()) -> int:
    """Return the size of all files below a folder but for those in the subfolders `without`."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in without
    )
