"""What this process holds: resident bytes and Python objects, when the garbage is collected."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Held:
    """Resident memory, and the objects that Python's collector knows."""

    num_bytes: int
    num_objects: int


def held() -> Held:
    """Collect garbage, give free memory back to the system, and look."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return Held(num_pages * _PAGE_BYTES, len(gc.get_objects()))


def slope(values: Sequence[float]) -> float:
    """Return the growth from one value to the next: the median over all pairs (Theil 1950, Sen
    1968), which a few values that jump do not move.

    >>> slope([1, 2, 3, 99, 5, 6])
    1.0
    """
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((y - x) / (j - i) for (i, x), (j, y) in pairs)
