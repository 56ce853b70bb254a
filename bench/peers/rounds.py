"""One round of a comparison: who measures what when, and with which prompts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.peers.client import Worker, WorkerFailedError
from bench.peers.machine import watch_foreign_share
from bench.peers.results import Config, Measurement, Results
from bench.prompts import PromptSource

RUNS_PER_TURN = 3
"""One that warms the caches, one of a single token, one of many."""


@dataclass(frozen=True, slots=True)
class SideTurn:
    """One side's measurement in one round; `kind` and `size` as in `Measurement`."""

    round: int
    side: str
    kind: str
    size: int

    @property
    def batch(self) -> int:
        return self.size if self.kind == "decode" else 1


def measure_round(
    round_number: int, workers: dict[str, Worker], source: PromptSource, results: Results
) -> Iterator[SideTurn]:
    """Measure what this round lacks, yielding after each turn.

    A side that fails is absent from then on and leaves `workers`.
    """
    done = {SideTurn(m.round, m.side, m.kind, m.size) for m in results.measurements}
    for turn in shuffled_turns(round_number, list(workers), results.config):
        if turn in done or turn.side not in workers:
            continue
        record, worker = results.sides[turn.side], workers[turn.side]
        try:
            measurement = _measure(worker, turn, source, results.config)
        except WorkerFailedError as error:
            record.absent = f"failed in round {turn.round}, {turn.kind} of {turn.size}: {error}"
            print(f"{turn.side} {record.absent}", file=sys.stderr, flush=True)
            workers.pop(turn.side).close()
        else:
            record.peak_memory_bytes = worker.peak_memory_bytes
            results.measurements.append(measurement)
        yield turn


def shuffled_turns(round_number: int, sides: Sequence[str], config: Config) -> Iterator[SideTurn]:
    """Yield all turns of a round, kind after kind, so that the sides of a ratio are neighbours."""
    generator = random.Random(f"{config.seed}/{round_number}")
    kinds = _kinds(config)
    for kind, size in generator.sample(kinds, len(kinds)):
        for side in generator.sample(sides, len(sides)):
            yield SideTurn(round_number, side, kind, size)


def draw_prompts(source: PromptSource, turn: SideTurn, config: Config) -> list[list[list[int]]]:
    """Return the prompts of each run: the same for every side, others in every kind and round."""
    batches = [SideTurn(0, "", kind, size).batch for kind, size in _kinds(config)]
    before = sum(batches[: _kinds(config).index((turn.kind, turn.size))])
    first = RUNS_PER_TURN * (turn.round * sum(batches) + before)
    num_tokens = config.prompt_tokens if turn.kind == "decode" else turn.size
    return [
        source.draw(first + run * turn.batch, turn.batch, num_tokens)
        for run in range(RUNS_PER_TURN)
    ]


def _measure(worker: Worker, turn: SideTurn, source: PromptSource, config: Config) -> Measurement:
    """Raises WorkerFailedError."""
    warm_up, short, long = draw_prompts(source, turn, config)
    # Two tokens: a prefill and a decode step of this very shape.
    worker.generate(warm_up, 2)
    with watch_foreign_share(worker.cpu_s) as foreign:
        short_s = worker.generate(short, 1)
        long_s = worker.generate(long, config.new_tokens) if turn.kind == "decode" else None
    return Measurement(turn.round, turn.side, turn.kind, turn.size, short_s, long_s, foreign.share)


def _kinds(config: Config) -> list[tuple[str, int]]:
    return [
        *(("decode", batch) for batch in config.batches),
        *(("prefill", num_tokens) for num_tokens in config.prefill_tokens),
    ]
