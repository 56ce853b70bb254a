"""The highest rate that meets an SLO: doubled until it fails, then bisected.

Pure logic over a measurement. Wilson's interval of the share of good requests decides; while it
holds the objective's share the same rate is measured again and the counts add up.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.analysis.statistics import wilson
from loadtest.config import Tally

Measure = Callable[[float, int], Sequence[Tally]]
"""Takes a rate in requests per second and how often it was measured before; its tallies."""


class RateVerdict(enum.Enum):
    """Whether a rate meets the SLO."""

    MEETS = "meets"
    FAILS = "fails"
    UNDECIDED = "too few requests to tell"


@dataclass(frozen=True, slots=True)
class Search:
    """Where to look. The search ends when the bracket is within `relative_width` of its rate."""

    start_rps: float = 1.0
    min_rps: float = 0.01
    max_rps: float = 10_000.0
    relative_width: float = 0.1
    max_repeats: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.min_rps <= self.start_rps <= self.max_rps:
            raise ValueError(
                f"rates are {self.min_rps}, {self.start_rps}, {self.max_rps} requests per second;"
                " give 0 < min_rps <= start_rps <= max_rps"
            )
        if not self.relative_width > 0 or self.max_repeats < 0:
            raise ValueError(
                f"relative_width is {self.relative_width}, max_repeats {self.max_repeats};"
                " the first must be above 0, the second not below"
            )


@dataclass(frozen=True, slots=True)
class RateStep:
    """One rate and what came of it, over all its measurements."""

    rate_rps: float
    verdict: RateVerdict
    tallies: tuple[Tally, ...]


@dataclass(frozen=True, slots=True)
class MaxRate:
    """The highest rate that met the SLO and the lowest above it that did not, as found.

    `meets_rps` None: none did, down to `min_rps`. `fails_rps` None: all did, up to `max_rps`.
    """

    meets_rps: float | None
    fails_rps: float | None
    steps: tuple[RateStep, ...]


def find_max(
    measure: Measure, search: Search, on_step: Callable[[RateStep], None] = lambda step: None
) -> MaxRate:
    """Return the highest rate whose objectives are all met.

    A rate that stays undecided counts as not met: nobody should plan with it. `measure` should
    draw another schedule when it repeats a rate.

    Raises:
        ValueError: `measure` returned no tally, or none with requests.
    """
    steps: list[RateStep] = []

    def meets(rate_rps: float) -> bool:
        steps.append(_step(measure, rate_rps, search.max_repeats))
        on_step(steps[-1])
        return steps[-1].verdict is RateVerdict.MEETS

    low, high = _bracket(meets, search)
    while low is not None and high is not None and high - low > search.relative_width * low:
        middle = (low + high) / 2
        if meets(middle):
            low = middle
        else:
            high = middle
    return MaxRate(low, high, tuple(steps))


def judge(tallies: Sequence[Tally]) -> RateVerdict:
    """Return whether all objectives are met for sure, one is missed for sure, or neither.

    Raises:
        ValueError: no tally, or one without requests.
    """
    if not tallies or not all(tally.num_offered for tally in tallies):
        raise ValueError("no request was offered under an SLO: there is nothing to judge")
    verdicts = [_judge(tally) for tally in tallies]
    if RateVerdict.FAILS in verdicts:
        return RateVerdict.FAILS
    return RateVerdict.UNDECIDED if RateVerdict.UNDECIDED in verdicts else RateVerdict.MEETS


def _judge(tally: Tally) -> RateVerdict:
    estimate = wilson(tally.num_good, tally.num_offered)
    assert estimate.low is not None and estimate.high is not None
    if estimate.low >= tally.objective.share:
        return RateVerdict.MEETS
    return RateVerdict.FAILS if estimate.high < tally.objective.share else RateVerdict.UNDECIDED


def _step(measure: Measure, rate_rps: float, max_repeats: int) -> RateStep:
    tallies = tuple(measure(rate_rps, 0))
    repeat = 0
    while (verdict := judge(tallies)) is RateVerdict.UNDECIDED and repeat < max_repeats:
        repeat += 1
        tallies = tuple(map(_add, tallies, measure(rate_rps, repeat)))
    return RateStep(rate_rps, verdict, tallies)


def _add(a: Tally, b: Tally) -> Tally:
    return Tally(a.objective, a.num_good + b.num_good, a.num_offered + b.num_offered)


def _bracket(meets: Callable[[float], bool], search: Search) -> tuple[float | None, float | None]:
    """Return a rate that meets and one that does not, by doubling or, failing that, halving."""
    low: float | None = None
    high: float | None = None
    rate_rps = search.start_rps
    while low is None or high is None:
        if meets(rate_rps):
            low = rate_rps
        else:
            high = rate_rps
        is_rising = high is None
        if rate_rps == (search.max_rps if is_rising else search.min_rps):
            break
        following = rate_rps * 2 if is_rising else rate_rps / 2
        rate_rps = min(max(following, search.min_rps), search.max_rps)
    return low, high
