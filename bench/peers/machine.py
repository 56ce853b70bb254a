"""What the machine is, and what else it does while something is measured. Linux only (`/proc`)."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class ForeignShare:
    """Part of all cores' time that went to other processes; known when the watch is over."""

    share: float = 0.0


@contextmanager
def watch_foreign_share(own_cpu_s: Callable[[], float]) -> Iterator[ForeignShare]:
    """Watch the block. `own_cpu_s` returns the CPU time of what is measured.

    The kernel counts in ticks of 10 ms, and this process is among the others.
    """
    foreign = ForeignShare()
    started_s, busy_s, own_s = time.monotonic(), busy_cpu_s(), own_cpu_s()
    yield foreign
    elapsed_s = (time.monotonic() - started_s) * (os.cpu_count() or 1)
    foreign.share = (busy_cpu_s() - busy_s - (own_cpu_s() - own_s)) / elapsed_s


def busy_cpu_s() -> float:
    """Return the seconds that all cores together have not idled since the machine started.

    Time stolen by the hypervisor counts: it is lost all the same.
    """
    user, nice, system, _, _, irq, softirq, steal = _proc_fields("/proc/stat")[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / _ticks_per_s()


def process_cpu_s(pid: int) -> float:
    """Return the CPU time of a process, all of its threads, user and system."""
    # The second field, the name, is in brackets and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _ticks_per_s()


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, memory and today's date, for the head of a results file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }


def _proc_fields(path: str) -> list[str]:
    return Path(path).read_text().split("\n", 1)[0].split()


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK")
