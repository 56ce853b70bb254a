"""How many CPUs this process may use, and how long its threads wait for work awake."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Rounds that a waiting thread of GNU OpenMP spins before it sleeps; its default are 300,000.
# Milliseconds for a library of Intel's or LLVM's.
_SPIN_ROUNDS = "2000"
_SPIN_MS = "1"


def bound_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have the threads of OpenMP, torch's, sleep soon when there is nothing to do.

    Those that spin take the CPU from a busy neighbour, and it from those that compute: a step takes
    ten times as long. It is read when torch is loaded. What is set already stands.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", _SPIN_ROUNDS)
        environ.setdefault("KMP_BLOCKTIME", _SPIN_MS)


def count_cpus(process: Path = Path("/proc/self")) -> int:
    """Return how many CPUs this process may use: by its affinity, and by the quotas of its groups.

    A pool of more threads than that is throttled in the middle of a step. A part of a CPU counts
    where it is the only one.
    """
    num_cpus = len(os.sched_getaffinity(0))
    quotas = [quota for mount in _mounts(process) for quota in _quotas(process, mount)]
    return min(num_cpus, *(max(int(quota), 1) for quota in quotas)) if quotas else num_cpus


class _Mount(NamedTuple):
    """A hierarchy of control groups: the group that is mounted, where, and of which version."""

    group: PurePosixPath
    folder: Path
    is_v2: bool


def _mounts(process: Path) -> Iterator[_Mount]:
    """Yield the hierarchies that may limit the CPU; see proc_pid_mountinfo(5)."""
    for line in _lines(process / "mountinfo"):
        place, _, kind = line.partition(" - ")
        fields, (file_system, _, *options) = place.split(), [*kind.split(), "", ""]
        is_v2 = file_system == "cgroup2"
        if is_v2 or (file_system == "cgroup" and "cpu" in options[0].split(",")):
            yield _Mount(PurePosixPath(fields[3]), Path(fields[4]), is_v2)


def _quotas(process: Path, mount: _Mount) -> Iterator[float]:
    """Yield the quotas, in CPUs, of this process's group and of those around it."""
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if (controllers == "") != mount.is_v2 or (
            controllers and "cpu" not in controllers.split(",")
        ):
            continue
        group = PurePosixPath(path)
        # In a container the path may be the host's; its own group is then what is mounted.
        inside = group.relative_to(mount.group) if group.is_relative_to(mount.group) else "."
        folder = mount.folder / inside
        while folder.is_relative_to(mount.folder):
            quota = _quota(folder, mount.is_v2)
            if quota is not None:
                yield quota
            folder = folder.parent


def _quota(folder: Path, is_v2: bool) -> float | None:
    """Return how many CPUs a group may use; None where it has no limit."""
    names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    words = [word for name in names for line in _lines(folder / name) for word in line.split()]
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None  # "max", or -1
    quota_us, period_us = map(int, words)
    return quota_us / period_us


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
