"""When requests come in an open loop: at random, evenly, or as a file says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bundle.errors import UserError
from loadtest.config import Arrival


def arrival_times(
    arrival: Arrival,
    rate_rps: float,
    end_s: float,
    rng: np.random.Generator,
    trace: Sequence[float] = (),
) -> list[float]:
    """Return the times from 0 to below `end_s`, in ascending order.

    `poisson`: the gaps are exponential with the mean 1/rate. `constant`: every 1/rate, from 0.
    `trace`: those of `trace`, as they are.
    """
    times_s: Iterable[float]
    if arrival == "poisson":
        gaps_s = iter(lambda: float(rng.exponential(1 / rate_rps)), None)
        times_s = itertools.accumulate(gaps_s)
    elif arrival == "constant":
        times_s = (number / rate_rps for number in itertools.count())
    else:
        assert arrival == "trace", arrival
        times_s = trace
    return list(itertools.takewhile(lambda time_s: time_s < end_s, times_s))


def read_trace(path: Path) -> list[float]:
    """Return the times of a file, one per line, in seconds; blank lines are left out.

    UserError: it cannot be read, is empty, or a time is none, below 0 or before the last one (as in
    a list of gaps).
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    times_s: list[float] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            times_s.append(_parse_time(line, times_s[-1] if times_s else 0.0, f"{path}:{number}"))
    if not times_s:
        raise UserError(f"{path} is empty; give a time in seconds per line")
    return times_s


def _parse_time(line: str, earliest_s: float, place: str) -> float:
    try:
        time_s = float(line)
    except ValueError:
        raise UserError(f"{place}: {line.strip()!r} is no time in seconds") from None
    if not earliest_s <= time_s < math.inf:
        raise UserError(
            f"{place}: {time_s:g} s; times start at 0 and do not go down (here from "
            f"{earliest_s:g} s): they are when requests come, not the gaps between"
        )
    return time_s
