from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from estimators.estimate import Estimate
from report.formats import (
    NBSP,
    judge,
    show_bytes,
    show_count,
    show_duration,
    show_estimate,
    show_number,
    show_percent,
    show_percent_estimate,
    show_points,
    show_ratio,
    show_time,
    show_time_estimate,
)


@pytest.mark.parametrize(
    "show", [show_number, show_percent, show_bytes, show_count, show_time, show_duration]
)
def test_number_that_is_missing_or_not_finite_says_which(
    show: Callable[[float | None], str],
) -> None:
    assert show(None) == "not measured"
    assert show(math.nan) == show(math.inf) == "not finite"


@pytest.mark.parametrize(
    "show",
    [show_estimate, show_percent_estimate, show_time_estimate, show_ratio, show_points],
)
def test_estimate_that_is_missing_or_not_finite_says_which(
    show: Callable[[Estimate | None], str],
) -> None:
    assert show(None) == "not measured"
    assert show(Estimate(math.nan, 1.0, 2.0)) == "not finite"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_number(0.031274), "0.03127"),
        (show_number(1234.5), "1,234"),
        (show_bytes(0), "0 B"),
        (show_bytes(999), "999 B"),
        (show_bytes(999_940), "999.9 kB"),
        (show_bytes(999_960), "1 MB"),
        (show_bytes(5e15), "5000 TB"),
        (show_count(512), "512"),
        (show_count(1_500_000_000_000), "1500 billion"),
        (show_time(0.01234), "12.3 ms"),
        (show_time(12.34), "12.3 s"),
        (show_duration(0.1234), "0.123 s"),
        (show_duration(59.94), "59.9 s"),
        (show_duration(60), "1 min 00 s"),
        (show_duration(3599.6), "1 h 00 min"),
        (show_duration(7265), "2 h 01 min"),
        (show_estimate(Estimate(0.5, 0.25, None)), "0.5"),
        (show_estimate(Estimate(0.5, 0.25, math.inf)), "0.5 [0.25, not finite]"),
        (show_percent_estimate(Estimate(0.5, 0.0, 1.0)), "50.0% [0.0%, 100.0%]"),
        (show_time_estimate(Estimate(12.0, 9.5, 14.0)), "12 s [9.5, 14]"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    assert shown.replace(NBSP, " ") == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.1, 1.5, "faster"),
        (0.5, 0.9, "slower"),
        (0.9, 1.1, "not significant"),
        (1.0, 1.5, "not significant"),
        (0.5, 1.0, "not significant"),
        (None, None, "no interval"),
    ],
)
def test_only_an_interval_wholly_on_one_side_is_a_difference(
    low: float | None, high: float | None, expected: str
) -> None:
    assert judge(Estimate(1.2, low, high), 1.0, "faster", "slower") == expected
