"""Memory runs out in the middle of a run: a pass is tried again with less, and no slot leaks.

The allocations that fail are real ones. By phase:

    now and then    a tenth of the passes fails once: nobody notices
    large passes    no pass of more than 8 tokens has room, where 16 are allowed: nobody notices
    some prompts    there is never room for marked prompts: their requests fail, no other one does
    many rows       no decode step of more than 4 rows has room: the youngest fail, and not many

What fails says so (INTERNAL). Tokens are those of a run with all the memory it wants.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtest.ledger.journal import OK
from protos.tandem.v1 import inference_pb2 as pb
from serve.engine.engine import Engine
from tests.faults.answers import answers_of, codes_of
from tests.faults.result import RowResult, Size
from tests.faults.rig import Rig, requests_of
from tests.faults.server.faulty import quiet_log
from tests.support.backends import HistoryBackend, Pass

NUM_REQUESTS = {Size.CI: 40, Size.FULL: 2000}  # in each phase
MAX_PASS_TOKENS = 16
MARK = 1
"""A prompt that begins with it never fits in the phase of that name."""
FAILED = "INTERNAL"

Fits = Callable[[Pass], bool]


class TightBackend(HistoryBackend):
    """Has room for the passes that `fits` says; another one allocates more than there is."""

    fits: Fits = staticmethod(lambda rows: True)
    num_failed = 0

    def before_pass(self, first_row: int, rows: Pass) -> None:
        self.calls.clear()
        if not self.fits(rows):
            self.num_failed += 1
            torch.empty(1 << 48)


class NowAndThen:
    """Says no to a tenth of the passes, never twice in a row."""

    def __init__(self) -> None:
        self._rng = random.Random(0)
        self._has_failed = False

    def __call__(self, rows: Pass) -> bool:
        self._has_failed = not self._has_failed and self._rng.random() < 0.1
        return not self._has_failed


def has_few_tokens(rows: Pass) -> bool:
    return sum(len(new) for _, new in rows) <= MAX_PASS_TOKENS // 2


def has_no_mark(rows: Pass) -> bool:
    return not any(past == 0 and new[0] == MARK for past, new in rows)


def has_few_rows(rows: Pass) -> bool:
    is_decode_step = all(past and len(new) == 1 for past, new in rows)
    return not is_decode_step or len(rows) <= 4


@dataclass(frozen=True, slots=True)
class Phase:
    """How memory is short, and which requests may fail for it."""

    name: str
    make: Callable[[], Fits]
    may_fail: Callable[[pb.GenerateRequest], bool]


PHASES = (
    Phase("now and then", NowAndThen, lambda request: False),
    Phase("large passes", lambda: has_few_tokens, lambda request: False),
    Phase("some prompts", lambda: has_no_mark, lambda r: r.prompt_token_ids.ids[0] == MARK),
    Phase("many rows", lambda: has_few_rows, lambda request: True),
)


def run(size: Size) -> RowResult:
    """Go through the phases, in one server."""
    result = RowResult("R11", "out of memory in a pass")
    with (
        quiet_log(),
        tempfile.TemporaryDirectory() as folder,
        # Small passes, that prompts come in chunks as well.
        Rig(
            Path(folder),
            max_pass_tokens=MAX_PASS_TOKENS,
            max_replays=0,
            make_backend=TightBackend,
        ) as rig,
    ):
        requests = list(_requests(NUM_REQUESTS[size]))
        reference = rig.drive(iter(requests), "reference")
        for phase in PHASES:
            _run_phase(result, rig, phase, requests, reference)
    return result


def _requests(count: int) -> Iterator[pb.GenerateRequest]:
    """Yield requests with prompts of up to 26 tokens, of which a tenth are marked."""
    for number, request in enumerate(requests_of(count, seed=11)):
        ids = list(request.prompt_token_ids.ids)
        prompt = [MARK if number % 10 == 0 else 7, *ids, *ids[: 10 * (number % 2)]]
        request.prompt_token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        yield request


def _run_phase(
    result: RowResult,
    rig: Rig,
    phase: Phase,
    requests: Sequence[pb.GenerateRequest],
    reference: Path,
) -> None:
    for model in rig.engines.loaded:
        assert isinstance(model.engine, Engine)
        model.engine.core.runner.prefix_cache.clear()  # or there were no prompts to run
    backends = [backend for backend in rig.backends.values() if isinstance(backend, TightBackend)]
    for backend in backends:
        backend.fits, backend.num_failed = phase.make(), 0
    journal = rig.drive(iter(requests), phase.name)
    for backend in backends:
        backend.fits = TightBackend.fits
    result.add(rig.ledger(journal, reference))
    result.leaks += [f"{phase.name}: {leak}" for leak in rig.leaks()]
    num_failed = [backend.num_failed for backend in backends]
    result.measured[f"num_failed_passes, {phase.name}"] = sum(num_failed)
    result.demand(min(num_failed) > 0, f"{phase.name}: there was always memory")
    _judge(result, phase, requests, journal, reference)


def _judge(
    result: RowResult,
    phase: Phase,
    requests: Sequence[pb.GenerateRequest],
    journal: Path,
    reference: Path,
) -> None:
    """Those fail who may, by the status that they should; others have their whole answer."""
    codes, answers, expected = codes_of(journal), answers_of(journal), answers_of(reference)
    counts = Counter(codes.values())
    result.measured[f"codes, {phase.name}"] = dict(counts)
    innocent = [r.request_id for r in requests if not phase.may_fail(r)]
    harmed = [i for i in innocent if answers.get(i) != expected[i]]
    result.demand(not harmed, f"{phase.name}: {len(harmed)} others were harmed: {harmed[:5]}")
    can_fail = len(innocent) < len(requests)
    result.demand((counts[FAILED] > 0) is can_fail, f"{phase.name}: {counts[FAILED]} failed")
    result.demand(counts[OK] * 4 > 3 * len(requests), f"{phase.name}: only {counts[OK]} succeeded")
    odd = set(counts) - {OK, FAILED}
    result.demand(not odd, f"{phase.name}: calls ended with {sorted(odd)}")
