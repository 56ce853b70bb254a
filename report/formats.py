"""Numbers as people read them: what was not measured is said so, never left blank or 0.

A value has four digits, the ends of its interval have three. Everything here takes None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from estimators.estimate import Estimate

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
NOT_SIGNIFICANT = "not significant"
NBSP = "\N{NO-BREAK SPACE}"  # between a number and its unit
MIN_IN_SECONDS = 10.0  # shorter times are written in milliseconds

Show = Callable[[float], str]


def _or_missing(show: Show) -> Callable[[float | None], str]:
    def show_any(value: float | None) -> str:
        if value is None:
            return NOT_MEASURED
        return show(value) if math.isfinite(value) else NOT_FINITE

    return show_any


def _digits(value: float, num_digits: int = 4) -> str:
    """Write a number without an exponent where it can be read without one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{num_digits}g}"


def _three_digits(value: float) -> str:
    return _digits(value, 3)


def _scaled(value: float, units: Sequence[str]) -> str:
    """Write a value with the largest of its units, each a thousand of the one before."""
    for unit in units[:-1]:
        if abs(value) < 999.95:
            return f"{value:.4g}{NBSP}{unit}".strip()
        value /= 1000
    return f"{value:.4g}{NBSP}{units[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if abs(seconds) >= MIN_IN_SECONDS else (1e3, "ms")


def _time(seconds: float) -> str:
    factor, unit = _time_unit(seconds)
    return f"{_three_digits(factor * seconds)}{NBSP}{unit}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _signed_points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


show_number = _or_missing(_digits)
show_percent = _or_missing(_percent)
show_bytes = _or_missing(lambda value: _scaled(value, ("B", "kB", "MB", "GB", "TB")))
show_count = _or_missing(lambda value: _scaled(value, ("", "thousand", "million", "billion")))
show_time = _or_missing(_time)
show_duration = _or_missing(_duration)


def _with_interval(estimate: Estimate | None, show: Show, show_end: Show) -> str:
    if estimate is None:
        return NOT_MEASURED
    value = _or_missing(show)(estimate.value)
    if estimate.low is None or estimate.high is None or not math.isfinite(estimate.value):
        return value
    low, high = map(_or_missing(show_end), (estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def show_estimate(estimate: Estimate | None) -> str:
    """Write a number with its interval in brackets.

    >>> show_estimate(Estimate(0.31274, 0.2, 0.4)), show_estimate(Estimate(1234.5))
    ('0.3127 [0.2, 0.4]', '1,234')
    """
    return _with_interval(estimate, _digits, _three_digits)


def show_percent_estimate(estimate: Estimate | None) -> str:
    """Write a share with its interval.

    >>> show_percent_estimate(Estimate(0.5, 0.42, 0.58))
    '50.0% [42.0%, 58.0%]'
    """
    return _with_interval(estimate, _percent, _percent)


def show_time_estimate(estimate: Estimate | None) -> str:
    """Write a time in seconds with its interval, in one unit.

    >>> show_time_estimate(Estimate(0.0123, 0.011, 0.0141)), show_time_estimate(Estimate(12.34))
    ('12.3\\xa0ms [11, 14.1]', '12.3\\xa0s')
    """
    factor, _ = _time_unit(estimate.value if estimate else 0.0)
    return _with_interval(estimate, _time, lambda end: _three_digits(factor * end))


def show_ratio(estimate: Estimate | None) -> str:
    """Write how many times as fast.

    >>> show_ratio(Estimate(3.1, 2.9, 3.3))
    '3.1× [2.9, 3.3]'
    """
    return _with_interval(estimate, lambda value: f"{_three_digits(value)}×", _three_digits)


def show_points(estimate: Estimate | None) -> str:
    """Write a difference of shares in percentage points.

    >>> show_points(Estimate(-0.05, -0.09, 0.01))
    '−5.0\\xa0points [−9.0, +1.0]'
    """
    return _with_interval(
        estimate, lambda value: f"{_signed_points(value)}{NBSP}points", _signed_points
    )


def judge(estimate: Estimate, unchanged: float, above: str, below: str) -> str:
    """Return `above` or `below` where the whole interval is, else that it is not significant."""
    if (interval := estimate.interval) is None:
        return "no interval"
    if not interval.excludes(unchanged):
        return NOT_SIGNIFICANT
    return above if estimate.low is not None and estimate.low > unchanged else below
