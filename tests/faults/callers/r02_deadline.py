"""Deadlines pass while queued, prefilling and decoding: what was queued never reaches the model.

More is asked for than can run, in prompts of several passes. Half of the clients have a deadline of
their own, the others have the server's. An engine has the time of a pass to notice a deadline: no
pass may begin with a request whose deadline was over when the pass before it ended. A request that
no pass saw was queued, one whose prompt never was whole was prefilling.
"""

from __future__ import annotations

import enum
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.ledger.journal import Journal
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import AsyncClient
from serve.engine.scoring import ScoringRequest
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.pair.served import ServedModel
from tests.faults.paced import EngineWatch, PacedBackend
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, send

NUM_REQUESTS = {Size.CI: 400, Size.FULL: 8_000}
NUM_CLIENTS = 32
PROMPT_TOKENS = 40
MAX_PASS_TOKENS = 16  # a prompt takes three passes
PASS_S = 0.006
MAX_TIMEOUT_S = 0.3
MIN_PER_PHASE = 10
# One in so many is sent without faults, too, to compare.
REFERENCE_STRIDE = 10
_FIRST_TOKEN, _NUM_TOKENS = 4, 36


class Phase(enum.Enum):
    """Where a deadline found a request, at one model."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass(slots=True)
class _Known:
    """A request at one model: its deadline, the most tokens that a pass had, and its late passes.

    `is_expired` once its deadline or its client has ended it.
    """

    deadline_s: float
    num_tokens: int = 0
    num_late_passes: int = 0
    is_expired: bool = False

    @property
    def phase(self) -> Phase:
        if not self.num_tokens:
            return Phase.QUEUED
        return Phase.PREFILLING if self.num_tokens < PROMPT_TOKENS else Phase.DECODING


class Passes:
    """Notes which passes of a model see a request, which is known by the prompt's beginning."""

    def __init__(self, model: ServedModel, backend: PacedBackend) -> None:
        self.known: dict[tuple[int, ...], _Known] = {}
        self._ended_s = 0.0
        EngineWatch(model.engine, self._on_end, self._note)
        backend.on_pass, backend.on_passed = self._on_pass, self._on_passed

    def _note(self, request: GenerationRequest | ScoringRequest) -> None:
        assert request.deadline_s is not None
        self.known.setdefault(_mark(request.prompt_token_ids), _Known(request.deadline_s))

    def _on_pass(self, rows: list[list[int]]) -> None:
        for row in rows:
            known = self.known[_mark(row)]
            known.num_tokens = max(known.num_tokens, len(row))
            known.num_late_passes += known.deadline_s <= self._ended_s

    def _on_passed(self) -> None:
        self._ended_s = time.monotonic()

    def _on_end(self, request: GenerationRequest, reason: FinishReason) -> None:
        if reason in (FinishReason.DEADLINE, FinishReason.CANCELLED):
            self.known[_mark(request.prompt_token_ids)].is_expired = True


def _mark(token_ids: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(token_ids[:3])


def run(size: Size) -> RowResult:
    """Send more than can be done in time."""
    result = RowResult("R2", "deadline while queued, prefilling or decoding")
    requests = list(_requests(NUM_REQUESTS[size]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Rig(folder) as unhurried:
            reference = unhurried.drive(requests[::REFERENCE_STRIDE], "reference")
        rig = Rig(
            folder,
            make_backend=PacedBackend,
            max_pass_tokens=MAX_PASS_TOKENS,
            max_timeout_s=MAX_TIMEOUT_S,
            max_replays=0,
        )
        with rig:
            passes = _hurry(rig, requests, folder)
            ledger = rig.ledger(folder / "hurried.jsonl", reference)
            result.add(ledger)
            result.leaks = rig.leaks()
    unexpected = ledger.codes.keys() - {"OK", "DEADLINE_EXCEEDED"}
    result.demand(not unexpected, f"calls ended with {sorted(unexpected)}")
    _judge(result, [known for model in passes for known in model.known.values()])
    return result


def _requests(count: int) -> Iterator[pb.GenerateRequest]:
    """Yield requests whose prompts all begin differently."""
    rng = random.Random(2)
    for number in range(count):
        mark = [number // _NUM_TOKENS**2, number // _NUM_TOKENS % _NUM_TOKENS, number % _NUM_TOKENS]
        rest = rng.choices(range(_NUM_TOKENS), k=PROMPT_TOKENS - len(mark))
        yield pb.GenerateRequest(
            request_id=f"hurried-{number}",
            route=rng.choice([pb.ROUTE_STUDENT, pb.ROUTE_TEACHER, pb.ROUTE_BOTH]),
            prompt_token_ids=pb.TokenIds(ids=[_FIRST_TOKEN + token for token in [*mark, *rest]]),
            sampling=pb.SamplingParams(
                num_samples=rng.choice([1, 2]), seed=number, max_tokens=24, temperature=1.0
            ),
        )


def _hurry(rig: Rig, requests: list[pb.GenerateRequest], folder: Path) -> list[Passes]:
    """Send all, at a pace at which most cannot end in time, and return what the models saw."""
    backends = [rig.backends[model.role] for model in rig.engines.loaded]
    passes = [
        Passes(model, backend)
        for model, backend in zip(rig.engines.loaded, backends, strict=True)
        if isinstance(backend, PacedBackend)
    ]
    rng = random.Random(3)

    async def hurried(client: AsyncClient, request: pb.GenerateRequest, journal: Journal) -> None:
        if rng.random() < 0.5:
            await send(client, request, journal)
            return
        journal.sent(request)
        stream = client.generate(request, timeout_s=rng.uniform(0.02, MAX_TIMEOUT_S))
        await journal.follow(request, stream)

    for backend in backends:
        backend.pass_s = PASS_S
    rig.drive(requests, "hurried", num_clients=NUM_CLIENTS, send=hurried)
    for backend in backends:
        backend.pass_s, backend.on_pass = 0.0, PacedBackend.on_pass
    return passes


def _judge(result: RowResult, known: list[_Known]) -> None:
    phases = Counter(one.phase for one in known if one.is_expired)
    num_late = sum(one.num_late_passes for one in known)
    result.measured = {
        **{f"num_expired_{phase.value}": phases[phase] for phase in Phase},
        "num_late_passes": num_late,
    }
    for phase in Phase:
        count = phases[phase]
        result.demand(count >= MIN_PER_PHASE, f"only {count} expired while {phase.value}")
    result.demand(not num_late, f"{num_late} passes began behind a deadline")
