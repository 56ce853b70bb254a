"""Service level objectives: what latency is good enough, and how many requests had it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from loadtest.records import RequestRecord

Metric = Literal["ttft", "itl", "tpot", "e2e"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_OBJECTIVE = re.compile(rf"({'|'.join(METRICS)})_p([0-9]+(?:\.[0-9]+)?)=([^=]+)")


@dataclass(frozen=True, slots=True)
class LatencyObjective:
    """`percentile` percent of the requests (of the tokens, for itl) take at most `limit_s`."""

    metric: Metric
    percentile: float
    limit_s: float

    @property
    def share(self) -> float:
        return self.percentile / 100

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percentile:g}={self.limit_s:g}"

    def is_met_by(self, record: RequestRecord) -> bool:
        """Return whether the request ended OK within the limit.

        Its inter-token latencies are within it when their own share below is the percentile. A
        request of one token has none to miss; one without tokens has no time to the first.
        """
        if not record.is_ok:
            return False
        if self.metric == "itl":
            itls_s = record.itls_s
            num_within = sum(itl_s <= self.limit_s for itl_s in itls_s)
            return 100 * num_within >= self.percentile * len(itls_s)
        if self.metric == "tpot":
            return record.tpot_s is None or record.tpot_s <= self.limit_s
        value_s = record.ttft_s if self.metric == "ttft" else record.e2e_s
        return value_s is not None and value_s <= self.limit_s


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of the offered requests met one objective."""

    objective: LatencyObjective
    num_good: int
    num_offered: int


@dataclass(frozen=True, slots=True)
class Slo:
    """All objectives of a run; none: nothing is promised."""

    objectives: tuple[LatencyObjective, ...]

    def is_good(self, record: RequestRecord) -> bool:
        """Return whether a request counts for goodput: OK and within every limit."""
        return record.is_ok and all(each.is_met_by(record) for each in self.objectives)

    def tallies(self, records: Iterable[RequestRecord]) -> tuple[Tally, ...]:
        """Return each objective's count; requests that failed were offered, too."""
        offered = list(records)
        return tuple(
            Tally(each, sum(map(each.is_met_by, offered)), len(offered)) for each in self.objectives
        )


def parse_slo(text: str) -> Slo:
    """Return the objectives of a list such as `RunConfig.slo`; blank: none.

    Raises:
        ValueError: names the piece and what is allowed.

    >>> [str(objective) for objective in parse_slo("ttft_p95=0.2, e2e_p99.9=5").objectives]
    ['ttft_p95=0.2', 'e2e_p99.9=5']
    >>> parse_slo("ttft_p95=soon")
    Traceback (most recent call last):
        ...
    ValueError: slo 'ttft_p95=soon': 'soon' is no limit; give seconds above 0
    """
    if not text.strip():
        return Slo(())
    objectives = tuple(_parse_objective(piece.strip()) for piece in text.split(","))
    names = [str(each).partition("=")[0] for each in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"slo {text!r}: {name} is given {names.count(name)} times; give one")
    return Slo(objectives)


def _parse_objective(piece: str) -> LatencyObjective:
    match = _OBJECTIVE.fullmatch(piece)
    if match is None:
        raise ValueError(
            f"slo {piece!r}: write METRIC_pPERCENTILE=SECONDS, such as ttft_p95=0.2;"
            f" metrics are {', '.join(METRICS)}"
        )
    metric = next(each for each in METRICS if each == match[1])
    percentile = float(match[2])
    if not 50 <= percentile <= 99.9:
        raise ValueError(f"slo {piece!r}: percentiles are p50 to p99.9")
    return LatencyObjective(metric, percentile, _parse_limit_s(piece, match[3]))


def _parse_limit_s(piece: str, text: str) -> float:
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < float("inf"):
        raise ValueError(f"slo {piece!r}: {text!r} is no limit; give seconds above 0")
    return limit_s
