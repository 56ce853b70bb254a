from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bundle.errors import UserError
from loadtest.workload.arrivals import arrival_times, read_trace


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_constant_arrivals_are_a_gap_apart_and_end_before_the_end() -> None:
    assert arrival_times("constant", 2.0, 2.0, rng()) == [0.0, 0.5, 1.0, 1.5]


def test_trace_is_played_as_it_is_up_to_the_end() -> None:
    assert arrival_times("trace", 9.0, 2.0, rng(), [0.0, 0.25, 1.9, 2.0, 3.0]) == [0.0, 0.25, 1.9]


def test_poisson_gaps_are_exponential() -> None:
    """Mean and deviation are both 1/rate; the median is ln 2 / rate."""
    times_s = np.array(arrival_times("poisson", 50.0, 400.0, rng()))
    gaps_s = np.diff(times_s)
    assert np.all(gaps_s > 0)
    assert times_s[-1] < 400.0
    assert gaps_s.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps_s.std() == pytest.approx(0.02, rel=0.03)
    assert np.median(gaps_s) == pytest.approx(np.log(2) * 0.02, rel=0.03)


def test_longer_run_begins_like_a_shorter_one() -> None:
    short, long = (arrival_times("poisson", 5.0, end_s, rng()) for end_s in (10.0, 20.0))
    assert long[: len(short)] == short


def test_closed_loop_has_no_arrivals() -> None:
    with pytest.raises(AssertionError, match="closed"):
        arrival_times("closed", 1.0, 1.0, rng())


def test_trace_is_read_without_its_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("0\n0.25\n\n0.25\n1e1\n")
    assert read_trace(path) == [0.0, 0.25, 0.25, 10.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0\n\nsoon\n", "times.txt:3: 'soon' is no time in seconds"),
        (b"-1\n", "times.txt:1: -1 s; times start at 0"),
        (b"0.5\n0.25\n", "times.txt:2: 0.25 s; times start at 0 and do not go down (here from 0.5"),
        (b"nan\n", "times.txt:1: nan s"),
        (b"inf\n", "times.txt:1: inf s"),
        (b" \n", "times.txt is empty"),
        (b"\xff", "times.txt is not UTF-8 text"),
        (None, "times.txt cannot be read: No such file"),
    ],
)
def test_broken_trace_is_refused_by_its_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "times.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_trace(path)
