"""Numbers as the report writes them: what was not measured is said so, never left blank or 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from estimators.estimate import Estimate

NOT_MEASURED = "not measured"
NBSP = "\N{NO-BREAK SPACE}"  # between a number and its unit
MIN_IN_SECONDS = 10.0  # shorter times are written in milliseconds
INTERCHANGEABLE = "no difference shown"


def show_number(value: float | None) -> str:
    """Write a number with three digits, without an exponent where it can be read without one.

    >>> show_number(1234.5), show_number(0.0123), show_number(None)
    ('1,234', '0.0123', 'not measured')
    """
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show_share(value: float | None) -> str:
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.1%}"


def show_time(seconds: float | None) -> str:
    """Write a time in the unit that suits it.

    >>> show_time(0.01234), show_time(12.34)
    ('12.3\\xa0ms', '12.3\\xa0s')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    factor, unit = _unit(seconds)
    return f"{show_number(factor * seconds)}{NBSP}{unit}"


def show_estimate(estimate: Estimate | None) -> str:
    """Write a number with its interval.

    >>> show_estimate(Estimate(0.312, 0.25, 0.4, n=12)), show_estimate(Estimate(2, None, None, 1))
    ('0.312 [0.25, 0.4]', '2')
    """
    return _write(estimate, show_number, show_number)


def show_share_estimate(estimate: Estimate | None) -> str:
    return _write(estimate, show_share, show_share)


def show_time_estimate(estimate: Estimate | None) -> str:
    """Write a time with its interval, in one unit.

    >>> show_time_estimate(Estimate(0.0123, 0.011, 0.0141, n=80))
    '12.3\\xa0ms [11, 14.1]'
    """
    factor, _ = _unit(estimate.value if estimate else 0.0)
    return _write(estimate, show_time, lambda end: show_number(factor * end))


def show_ratio(estimate: Estimate | None) -> str:
    """Write how many times as fast.

    >>> show_ratio(Estimate(3.1, 2.9, 3.3, n=80))
    '3.1× [2.9, 3.3]'
    """
    return _write(estimate, lambda value: f"{show_number(value)}×", show_number)


def show_points(estimate: Estimate | None) -> str:
    """Write a difference of shares in percentage points.

    >>> show_points(Estimate(-0.05, -0.09, 0.01, n=80))
    '−5.0\\xa0points [−9.0, +1.0]'
    """
    return _write(estimate, lambda value: f"{_points(value)}{NBSP}points", _points)


def judge(estimate: Estimate, unchanged: float, above: str, below: str) -> str:
    """Return `above` or `below` where the whole interval is, else that no difference was shown."""
    if estimate.low is None or estimate.high is None:
        return "no interval"
    if estimate.low > unchanged:
        return above
    return below if estimate.high < unchanged else INTERCHANGEABLE


def _write(
    estimate: Estimate | None, value: Callable[[float], str], end: Callable[[float], str]
) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return NOT_MEASURED
    if estimate.low is None or estimate.high is None:
        return value(estimate.value)
    return f"{value(estimate.value)} [{end(estimate.low)}, {end(estimate.high)}]"


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if abs(seconds) >= MIN_IN_SECONDS else (1e3, "ms")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")
