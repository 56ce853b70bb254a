"""Whether anything was lost, duplicated or altered: holds a journal against the rules of the wire.

    python -m loadtest.ledger JOURNAL... [--reference JOURNAL] [--may-be-open]

A journal is a file, or a folder of files as `tandem loadtest run --journal FOLDER` writes it.
Every request that was sent ends once. A call that ends with OK has each sample of each model once,
and its Usage, which counts them. The chunks of a sample have neither gap nor repetition, and are
the sample's tokens, log-probabilities and text. Divergences follow from the log-probabilities
beside them, votes from the answers. With `--reference`, a journal of the same requests without
faults, the same request with the same seed has the same answer; what ended early has a beginning of
it. Exit code 1 where a rule is broken, 2 where a journal cannot be read.

A request is judged when it ends, and only its id is kept: memory is of what is open, and of ids.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.ledger.journal import read_journal
from loadtest.ledger.rules import (
    WHOLE,
    Event,
    Fault,
    Place,
    Request,
    check_request,
    differences,
    pairs,
)

__all__ = ["WHOLE", "Fault", "Ledger", "Violation", "check", "main", "render"]

_MAX_SHOWN = 20
Expected = Mapping[tuple[str, Place], Event]


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a request breaks."""

    fault: Fault
    request_id: str
    text: str

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.request_id}: {self.text}"


@dataclass(slots=True)
class Ledger:
    """The verdict on a journal.

    `num_compared` samples were held against a reference. `num_early` samples, of calls that ended
    with OK, ended otherwise than by STOP or LENGTH: nothing is wrong with that by itself.
    """

    num_requests: int = 0
    num_samples: int = 0
    num_compared: int = 0
    num_early: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)

    def count(self, fault: Fault) -> int:
        """Return how many requests have this fault."""
        return len({v.request_id for v in self.violations if v.fault is fault})

    @property
    def is_balanced(self) -> bool:
        return not self.violations

    def add(self, request_id: str, found: Iterable[tuple[Fault, str]]) -> None:
        """Note what is wrong with a request."""
        self.violations += [Violation(fault, request_id, text) for fault, text in found]


def check(
    events: Iterable[Event], reference: Iterable[Event] | None = None, *, may_be_open: bool = False
) -> Ledger:
    """Hold the events of a journal against the rules, and against a run without faults.

    `may_be_open` allows requests without an end: their client was killed.
    """
    ledger = Ledger()
    expected = _expected(reference or (), ledger)
    for request_id, request in _settled(events, ledger):
        ledger.num_requests += 1
        ledger.num_samples += sum(len(samples) for samples in request.samples.values())
        ledger.num_early += request.num_early
        ledger.codes.update([request.code] if request.code is not None else [])
        ledger.add(request_id, check_request(request, may_be_open=may_be_open))
        for sample, other in pairs(request, expected):
            ledger.num_compared += 1
            ledger.add(request_id, differences(sample, other))
    if reference is not None and ledger.num_samples and not ledger.num_compared:
        ledger.add("all", [(Fault.ALTERED, "the reference has none of these samples")])
    return ledger


def _expected(reference: Iterable[Event], ledger: Ledger) -> Expected:
    """Return the whole samples of a run without faults; two answers to the same are a fault."""
    expected: dict[tuple[str, Place], Event] = {}
    for request_id, request in _settled(reference, Ledger()):
        for place, (sample, *_) in request.samples.items():
            if request.sent and sample["finish_reason"] in WHOLE:
                known = expected.setdefault((request.sent[0]["what"], place), sample)
                ledger.add(f"{request_id} of the reference", differences(sample, known))
    return expected


def _settled(events: Iterable[Event], ledger: Ledger) -> Iterator[tuple[str, Request]]:
    """Yield each request as it ends, then those that do not; what comes later is a fault."""
    requests: dict[str, Request] = {}
    num_ends = Counter[str]()
    for event in events:
        request_id = event["id"]
        if request_id in num_ends:
            ledger.add(request_id, [(Fault.DUPLICATED, _behind_the_end(event, num_ends))])
            continue
        request = requests.setdefault(request_id, Request())
        ledger.add(request_id, request.take(event))
        if request.code is not None:
            num_ends[request_id] = 1
            yield request_id, requests.pop(request_id)
    yield from requests.items()


def _behind_the_end(event: Event, num_ends: Counter[str]) -> str:
    match event["event"]:
        case "end":
            num_ends[event["id"]] += 1
            return f"ended {num_ends[event['id']]} times, with {event['code']} the last time"
        case "sent":
            return "sent again under one id"
        case kind:
            return f"{kind} behind the end of the call"


def render(ledger: Ledger) -> str:
    """Return the verdict as text."""
    codes = ", ".join(f"{code} {count}" for code, count in sorted(ledger.codes.items()))
    faults = ", ".join(f"{ledger.count(fault)} {fault.value}" for fault in Fault)
    shown = [f"  {violation}" for violation in ledger.violations[:_MAX_SHOWN]]
    hidden = len(ledger.violations) - len(shown)
    return "\n".join(
        [
            f"{ledger.num_requests} requests ({codes or 'none ended'}), {ledger.num_samples} "
            f"samples, {ledger.num_compared} compared with the reference, "
            f"{ledger.num_early} ended early",
            f"{faults}: {'balanced' if ledger.is_balanced else 'NOT BALANCED'}",
            *shown,
            *([f"  and {hidden} more"] if hidden else []),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Check journals from the command line, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "journals", nargs="+", type=Path, metavar="JOURNAL", help="A file, or a folder of them."
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="The journal of the same requests without faults; by default there is none.",
    )
    parser.add_argument(
        "--may-be-open",
        action="store_true",
        help="Requests may lack an end, since a client was killed; by default they may not.",
    )
    given = parser.parse_args(arguments)
    try:
        reference = read_journal([given.reference]) if given.reference else None
        ledger = check(read_journal(given.journals), reference, may_be_open=given.may_be_open)
    except (OSError, ValueError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    print(render(ledger))
    return 0 if ledger.is_balanced else 1
