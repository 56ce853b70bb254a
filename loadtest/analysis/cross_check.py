"""What the server counted beside what the client saw: two scrapes of /metrics and the records.

The server's histogram of times to the first token has one value per request, of the first of its
samples, from its arrival there. So the client's is taken from when it was sent, not from when it
was due.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.records import RequestRecord
from loadtest.server_metrics import Scrape

_TTFT = "tandem_time_to_first_token_seconds_bucket"
_REQUESTS = "tandem_requests_total"


@dataclass(frozen=True, slots=True)
class QuantileCheck:
    """A quantile of the time to the first token: the client's, and the server's bucket of it."""

    arm: str
    quantile: float
    client_s: float
    server_low_s: float
    server_high_s: float
    num_buckets_apart: int
    count: int

    @property
    def agrees(self) -> bool:
        return self.num_buckets_apart <= 1


@dataclass(frozen=True, slots=True)
class CountCheck:
    """Requests of one arm by how they ended, at the client and at the server."""

    arm: str
    client: dict[str, int]
    server: dict[str, int]

    @property
    def agrees(self) -> bool:
        return self.client == self.server


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """Whether client and server saw the same run."""

    ttft: tuple[QuantileCheck, ...]
    counts: tuple[CountCheck, ...]

    @property
    def agrees(self) -> bool:
        return all(c.agrees for c in self.ttft) and all(c.agrees for c in self.counts)


def cross_check(
    before: Scrape, after: Scrape, records: Sequence[RequestRecord], arms: Iterable[str]
) -> CrossCheck:
    """Compare two scrapes with everything that was sent between them, warm-up included.

    Nobody else may have used the server meanwhile.
    """
    ttft: list[QuantileCheck] = []
    counts = []
    for arm in arms:
        mine = [record for record in records if record.plan.arm == arm]
        ttft += _check_ttft(arm, before, after, mine)
        counts.append(_check_counts(arm, before, after, mine))
    return CrossCheck(tuple(ttft), tuple(counts))


def _check_counts(
    arm: str, before: Scrape, after: Scrape, records: Sequence[RequestRecord]
) -> CountCheck:
    server: Counter[str] = Counter()
    for sign, found in ((1, after), (-1, before)):
        for labels, value in found.of(_REQUESTS, rpc="Generate", route=arm).items():
            server[dict(labels)["code"]] += sign * round(value)
    client = Counter(record.status for record in records)
    return CountCheck(arm, dict(client), {code: n for code, n in server.items() if n})


def _check_ttft(
    arm: str, before: Scrape, after: Scrape, records: Sequence[RequestRecord]
) -> list[QuantileCheck]:
    """Check the median and the 95th percentile, where there are requests with tokens."""
    times_s = sorted(
        record.ttft_s + record.start_s - record.sent_s
        for record in records
        if record.ttft_s is not None
    )
    edges, cumulative = _histogram(arm, before, after)
    if not times_s or not cumulative or not cumulative[-1]:
        return []
    return [_check_quantile(arm, q, times_s, edges, cumulative) for q in (0.5, 0.95)]


def _histogram(arm: str, before: Scrape, after: Scrape) -> tuple[list[float], list[float]]:
    """Return upper edges in seconds, the last one infinite, and counts up to each."""
    old = {dict(labels)["le"]: n for labels, n in before.of(_TTFT, role=arm).items()}
    new = {dict(labels)["le"]: n for labels, n in after.of(_TTFT, role=arm).items()}
    grown = sorted((float(le), count - old.get(le, 0.0)) for le, count in new.items())
    return [edge for edge, _ in grown], [count for _, count in grown]


def _check_quantile(
    arm: str,
    quantile: float,
    times_s: Sequence[float],
    edges: Sequence[float],
    cumulative: Sequence[float],
) -> QuantileCheck:
    """Compare by nearest rank: the rank-th smallest of either side."""
    client_s = times_s[math.ceil(quantile * len(times_s)) - 1]
    server = bisect.bisect_left(cumulative, math.ceil(quantile * cumulative[-1]))
    client = bisect.bisect_left(edges, client_s)
    return QuantileCheck(
        arm=arm,
        quantile=quantile,
        client_s=client_s,
        server_low_s=edges[server - 1] if server else 0.0,
        server_high_s=edges[server],
        num_buckets_apart=abs(server - client),
        count=len(times_s),
    )
