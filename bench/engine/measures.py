"""Raw values of every round, their medians with the range, targets and verdicts.

Ratios are taken within a round, before the median over the rounds: what slows the machine down for
a while slows both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.peers.results import Spread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MedianLimit:
    """A target that the median keeps to."""

    limit: float
    is_upper: bool

    def allows(self, value: float) -> bool:
        """Whether the value is within the limit, the limit itself included.

        >>> at_most(0.3).allows(0.3), at_least(6).allows(5.9)
        (True, False)
        """
        return value <= self.limit if self.is_upper else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.is_upper else '≥'} {self.limit:g}"


def at_most(limit: float) -> MedianLimit:
    return MedianLimit(limit, is_upper=True)


def at_least(limit: float) -> MedianLimit:
    return MedianLimit(limit, is_upper=False)


@dataclass(frozen=True, slots=True)
class Measure:
    """One quantity: a value per round (a soak's are samples over its time)."""

    name: str
    unit: str
    target: MedianLimit | None
    values: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps to the target; None without one."""
        return None if self.target is None else self.target.allows(self.spread.median)

    def to_json(self) -> dict[str, Any]:
        spread = self.spread
        return {
            "unit": self.unit,
            "median": spread.median,
            "min": spread.min,
            "max": spread.max,
            "target": None if self.target is None else str(self.target),
            "is_met": self.is_met,
            "values": self.values,
        }


class Measures:
    """The quantities of one check, in the order in which they first came."""

    def __init__(self) -> None:
        self.by_name: dict[str, Measure] = {}

    def add(self, name: str, unit: str, value: float, target: MedianLimit | None = None) -> None:
        self.by_name.setdefault(name, Measure(name, unit, target)).values.append(value)

    def rounds(self, num_rounds: int) -> Iterator[Round]:
        """Yield a round that warms up and records nothing, then those that record here."""
        yield Round(-1, Measures())
        for number in range(num_rounds):
            yield Round(number, self)


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over all sides of a check."""

    number: int
    measures: Measures

    def add(self, name: str, unit: str, value: float, target: MedianLimit | None = None) -> None:
        self.measures.add(name, unit, value, target)

    def order(self, sides: Sequence[T]) -> Sequence[T]:
        """Return the sides, every other time the last one first."""
        return sides if self.number % 2 else sides[::-1]


def render(checks: Mapping[str, Measures]) -> str:
    """Return one line per measure: name, median, range, target, verdict."""
    lines = [f"{'measure':62}{'median':>10}  {'(min–max)':24}{'target':>9}  verdict"]
    for check, measures in checks.items():
        lines.append(check)
        lines += [_line(measure) for measure in measures.by_name.values()]
    return "\n".join(lines)


def _line(measure: Measure) -> str:
    spread = measure.spread
    verdict = {None: "", True: "met", False: "MISSED"}[measure.is_met]
    target = "" if measure.target is None else str(measure.target)
    label = f"  {measure.name}, {measure.unit}" if measure.unit else f"  {measure.name}"
    reach = f"({_short(spread.min)}–{_short(spread.max)})"
    return f"{label:62}{_short(spread.median):>10}  {reach:24}{target:>9}  {verdict}".rstrip()


def _short(value: float) -> str:
    """Return four significant digits, without an exponent where it is large.

    >>> _short(0.01234567), _short(912.44), _short(51234.5)
    ('0.01235', '912.4', '51234')
    """
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
