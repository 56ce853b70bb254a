"""How much longer others wait beside a fault: measured with and without it, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from tests.faults.calls import quiet_collector
from tests.faults.result import RowResult
from tests.faults.rig import Rig, requests_of, send

NUM_TEMPLATES = 50
_NUM_CLIENTS = 4
# One kind of request, or the mix would be what is measured.
_SAMPLING = pb.SamplingParams(num_samples=1, seed=7, max_tokens=8, temperature=1.0)


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often to measure, how many requests each time, and what others may wait at most.

    `percentile` of a round's latencies is what is compared: 99 needs some hundred of them. Where
    the ratio is above `max_ratio`, rounds go on up to `max_rounds`: a machine that others use as
    well has bad moments.
    """

    num_rounds: int
    max_rounds: int
    num_requests: int
    percentile: int
    max_ratio: float


@dataclass(slots=True)
class Waits:
    """A percentile of each round, in seconds."""

    rounds: Rounds
    alone_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median over rounds, since a round that something else disturbed says nothing."""
        pairs = zip(self.beside_s, self.alone_s, strict=True)
        return statistics.median(beside / alone for beside, alone in pairs)

    @property
    def is_enough(self) -> bool:
        """Whether no more rounds are needed."""
        num_rounds = len(self.alone_s)
        if num_rounds < self.rounds.num_rounds:
            return False
        return self.ratio <= self.rounds.max_ratio or num_rounds >= self.rounds.max_rounds

    def judge(self, result: RowResult) -> None:
        """Note what was measured, and whether it is too much."""
        name = f"p{self.rounds.percentile}"
        result.latency_ratio = self.ratio
        result.measured |= {
            f"{name}_alone_s": statistics.median(self.alone_s),
            f"{name}_beside_s": statistics.median(self.beside_s),
            "num_rounds": len(self.alone_s),
            "max_ratio": self.rounds.max_ratio,
        }
        is_met = self.ratio <= self.rounds.max_ratio
        text = f"others' {name} is {self.ratio:.2f} times as long"
        result.demand(is_met, text, is_timed=True)


def bystanders(count: int) -> Iterator[pb.GenerateRequest]:
    """Yield the requests of those who have nothing to do with the fault."""
    return iter(
        requests_of(count, num_templates=NUM_TEMPLATES, route=pb.ROUTE_STUDENT, sampling=_SAMPLING)
    )


def compare_waits(
    rig: Rig,
    rounds: Rounds,
    fault: Callable[[], AbstractContextManager[object]],
    journal_name: str,
) -> tuple[Path, Waits]:
    """Measure, round by round, without and with the fault in turns; returns the journal, too."""
    requests, waits = bystanders(2 * rounds.max_rounds * rounds.num_requests), Waits(rounds)
    rig.drive(islice(bystanders(NUM_TEMPLATES), NUM_TEMPLATES), "warm")
    with quiet_collector():  # as `tandem serve` has it
        while not waits.is_enough:
            is_odd = len(waits.alone_s) % 2
            sides = [(nullcontext, waits.alone_s), (fault, waits.beside_s)]
            for condition, measured_s in sides[:: -1 if is_odd else 1]:
                with condition():
                    wave = islice(requests, rounds.num_requests)
                    journal, latencies_s = _timed(rig, wave, journal_name)
                measured_s.append(float(np.percentile(latencies_s, rounds.percentile)))
    return journal, waits


def _timed(rig: Rig, requests: Iterator[pb.GenerateRequest], name: str) -> tuple[Path, list[float]]:
    latencies_s: list[float] = []

    async def timed(client: AsyncClient, request: pb.GenerateRequest, journal: Journal) -> None:
        started_s = time.perf_counter()
        await send(client, request, journal)
        latencies_s.append(time.perf_counter() - started_s)

    journal = rig.drive(requests, name, num_clients=_NUM_CLIENTS, send=timed)
    return journal, latencies_s
