"""When each request of a run is sent, to which arm: fixed by the seed before the start.

A run visits its loads one after the other, a warm-up at the lowest one first. At each load the arms
take turns, a block each; a round has one block of every arm, in a random order. The blocks of a
round have the same requests at the same offsets, so that what differs between them is the arm
alone. Which prompts come in which order is the same at all loads.

Each source of chance has a seed of its own, as in MLPerf's loadgen: another order of the arms, say,
leaves arrivals, prompts and sampling what they are. So do the loads beside a load.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bundle.errors import UserError
from bundle.hashing import hash_json
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, Phase, PlannedRequest
from loadtest.workload.arrivals import arrival_times, read_trace

# How long the list is that the workers of a closed loop draw from: more than they can send.
MAX_CLOSED_RPS_PER_WORKER = 200
MAX_CLOSED_RPS = 2000
_SEED_BOUND = 2**63  # what fits every server's integers


class _Chance(enum.IntEnum):
    ARRIVALS = 0
    PROMPTS = 1
    ARM_ORDER = 2
    SAMPLING = 3


@dataclass(frozen=True, slots=True)
class Block:
    """One arm's turn. `load` is in requests per second, in closed loops the requests at a time.

    A closed loop's workers draw from `requests` in their order until `end_s`. The list is meant to
    be longer than that takes; where it is not, the workers are idle and the load is not the asked.
    """

    index: int
    load: float
    arm: str
    start_s: float
    end_s: float
    phase: Phase
    requests: tuple[PlannedRequest, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run's blocks in the order of time.

    `sha256` is over all that decides what is sent when: times to the microsecond, arms, prompts,
    seeds, sampling settings. Two runs with the same one can be compared request by request.
    """

    blocks: tuple[Block, ...]
    sha256: str

    @property
    def requests(self) -> tuple[PlannedRequest, ...]:
        """All requests, numbered from 0, in the order in which they are sent."""
        return tuple(itertools.chain.from_iterable(block.requests for block in self.blocks))

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(sorted({block.load for block in self.blocks}))

    @property
    def duration_s(self) -> float:
        """Until the last block ends; requests may still be on their way then."""
        return self.blocks[-1].end_s


def plan(config: RunConfig, prompts: Sequence[DatasetPrompt]) -> Schedule:
    """Return when what is sent. UserError: the trace is broken, or a load sends nothing."""
    assert prompts, "a dataset has at least one prompt"
    rounds = [
        each for stretch in _stretches(config) for each in _plan_rounds(config, stretch, prompts)
    ]
    blocks = _lay_out(config, rounds)
    return Schedule(blocks, _hash(config, prompts, blocks))


# --- what: rounds without a clock


@dataclass(frozen=True, slots=True)
class _Stretch:
    """All rounds at one load; `length_s` is each arm's share of it.

    `times_s` are the arrivals in that share, None in a closed loop.
    """

    load: float
    phase: Phase
    length_s: float
    times_s: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class _Draw:
    """What all arms of a round are sent; `offset_s` is from the start of the block."""

    offset_s: float | None
    prompt_id: str
    seed: int


@dataclass(frozen=True, slots=True)
class _Round:
    load: float
    phase: Phase
    block_s: float
    arms: tuple[str, ...]
    draws: tuple[_Draw, ...]


def _stretches(config: RunConfig) -> Iterator[_Stretch]:
    trace = read_trace(config.trace) if config.trace is not None else ()
    loads = _loads(config, trace)
    if config.warmup_s:
        yield _stretch(config, loads[0], Phase.WARMUP, config.warmup_s, trace)
    for load in loads:
        stretch = _stretch(config, load, Phase.MEASURED, config.duration_s, trace)
        if stretch.times_s is not None and not stretch.times_s:
            raise UserError(
                f"at {load:g} requests per second nothing is sent in {config.duration_s:g} s; "
                "give a longer duration or a higher rate"
            )
        yield stretch


def _loads(config: RunConfig, trace: Sequence[float]) -> list[float]:
    """Return the loads in ascending order; a trace's is its mean rate."""
    if config.arrival == "closed":
        return sorted(map(float, config.concurrency))
    if config.arrival == "trace":
        return [sum(time_s < config.duration_s for time_s in trace) / config.duration_s]
    return sorted(config.rates_rps)


def _stretch(
    config: RunConfig, load: float, phase: Phase, length_s: float, trace: Sequence[float]
) -> _Stretch:
    rng = _rng(config, _Chance.ARRIVALS, phase, load)
    is_open = config.is_open_loop
    times_s = arrival_times(config.arrival, load, length_s, rng, trace) if is_open else None
    return _Stretch(load, phase, length_s, times_s)


def _plan_rounds(
    config: RunConfig, stretch: _Stretch, prompts: Sequence[DatasetPrompt]
) -> Iterator[_Round]:
    """Yield the rounds of a stretch: blocks of equal length, `config.block_s` at most."""
    num_rounds = math.ceil(stretch.length_s / config.block_s)
    block_s = stretch.length_s / num_rounds
    if stretch.times_s is None:
        rps = min(stretch.load * MAX_CLOSED_RPS_PER_WORKER, MAX_CLOSED_RPS)
        offsets: list[list[float | None]] = [[None] * math.ceil(rps * block_s)] * num_rounds
    else:
        offsets = _cut(stretch.times_s, block_s, num_rounds)
    deck = _deal(prompts, _rng(config, _Chance.PROMPTS, stretch.phase))
    sampling = _rng(config, _Chance.SAMPLING, stretch.phase, stretch.load)
    arm_order = _rng(config, _Chance.ARM_ORDER, stretch.phase, stretch.load)
    for in_round in offsets:
        seeds = sampling.integers(_SEED_BOUND, size=len(in_round)).tolist()
        draws = tuple(map(_Draw, in_round, itertools.islice(deck, len(in_round)), seeds))
        arms = tuple(config.arms[index] for index in arm_order.permutation(len(config.arms)))
        yield _Round(stretch.load, stretch.phase, block_s, arms, draws)


def _cut(times_s: Sequence[float], block_s: float, num_rounds: int) -> list[list[float | None]]:
    """Return each round's times from its start, in whole microseconds, rounded down."""
    rounds: list[list[float | None]] = [[] for _ in range(num_rounds)]
    for time_s in times_s:
        index = min(int(time_s / block_s), num_rounds - 1)
        offset_s = min(max(time_s - index * block_s, 0.0), block_s)
        rounds[index].append(math.floor(offset_s * 1e6) / 1e6)
    return rounds


def _deal(prompts: Sequence[DatasetPrompt], rng: np.random.Generator) -> Iterator[str]:
    """Yield ids without end, shuffled anew when all were dealt: each is asked as often."""
    while True:
        for index in rng.permutation(len(prompts)):
            yield prompts[index].prompt_id


def _rng(
    config: RunConfig, chance: _Chance, phase: Phase, load: float = 0.0
) -> np.random.Generator:
    is_measured = int(phase is Phase.MEASURED)
    return np.random.default_rng([config.seed, chance, is_measured, round(load * 1e6)])


# --- when: rounds on the run's clock


def _lay_out(config: RunConfig, rounds: Sequence[_Round]) -> tuple[Block, ...]:
    """Put the blocks one behind the other, with `gap_s` between."""
    blocks: list[Block] = []
    start_s, num_requests, num_pairs = 0.0, 0, 0
    for each in rounds:
        for arm in each.arms:
            end_s = start_s + each.block_s
            requests = tuple(
                PlannedRequest(
                    number=num_requests + index,
                    arm=arm,
                    rate_rps=each.load if config.is_open_loop else None,
                    block=len(blocks),
                    pair=num_pairs + index,
                    prompt_id=draw.prompt_id,
                    seed=draw.seed,
                    phase=each.phase,
                    intended_s=None if draw.offset_s is None else start_s + draw.offset_s,
                    concurrency=None if config.is_open_loop else int(each.load),
                )
                for index, draw in enumerate(each.draws)
            )
            blocks.append(Block(len(blocks), each.load, arm, start_s, end_s, each.phase, requests))
            num_requests += len(requests)
            start_s = end_s + config.gap_s
        num_pairs += len(each.draws)
    return tuple(blocks)


def _hash(config: RunConfig, prompts: Sequence[DatasetPrompt], blocks: Sequence[Block]) -> str:
    return hash_json(
        {
            "prompts": [asdict(prompt) for prompt in prompts],
            "sampling": [config.num_samples, config.max_tokens, config.temperature],
            "blocks": [
                {
                    "load": block.load,
                    "arm": block.arm,
                    "phase": block.phase.value,
                    "microseconds": [_microseconds(block.start_s), _microseconds(block.end_s)],
                    "requests": [
                        [_microseconds(request.intended_s), request.prompt_id, request.seed]
                        for request in block.requests
                    ],
                }
                for block in blocks
            ],
        }
    )


def _microseconds(time_s: float | None) -> int | None:
    return None if time_s is None else round(time_s * 1e6)
