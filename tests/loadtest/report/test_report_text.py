from __future__ import annotations

import math

import pytest

from estimators.estimate import Estimate
from loadtest.report.report_text import (
    NOT_MEASURED,
    judge,
    show_estimate,
    show_number,
    show_points,
    show_ratio,
    show_share,
    show_share_estimate,
    show_time,
    show_time_estimate,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.1, 1.5, "faster"),
        (0.5, 0.9, "slower"),
        (0.9, 1.1, "no difference shown"),
        (1.0, 1.5, "no difference shown"),
        (0.5, 1.0, "no difference shown"),
        (None, None, "no interval"),
    ],
)
def test_only_an_interval_wholly_on_one_side_is_a_difference(
    low: float | None, high: float | None, expected: str
) -> None:
    assert judge(Estimate(1.2, low, high, 9), 1.0, "faster", "slower") == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_was_not_measured(value: float | None) -> None:
    assert {show_number(value), show_share(value), show_time(value)} == {NOT_MEASURED}
    estimate = None if value is None else Estimate(value, 1.0, 2.0, 9)
    for show in (show_estimate, show_share_estimate, show_time_estimate, show_ratio, show_points):
        assert show(estimate) == NOT_MEASURED


def test_ends_of_a_long_time_are_in_its_unit() -> None:
    assert show_time_estimate(Estimate(12.0, 9.5, 14.0, 9)) == "12\N{NO-BREAK SPACE}s [9.5, 14]"
