"""A number that was measured, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the ends of its confidence interval, and the count of values behind it.

    `low` and `high` are None together, where the data cannot show any spread (one prompt); `n` is
    None where nobody counted.

    >>> Estimate(0.3, 0.25, 0.35).interval
    Interval(low=0.25, high=0.35)
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> Interval | None:
        if self.low is None or self.high is None:
            return None
        return Interval(self.low, self.high)
