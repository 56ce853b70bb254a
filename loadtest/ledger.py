"""Whether anything was lost, duplicated or altered: holds a journal against the rules of the wire.

    python -m loadtest.ledger JOURNAL... [--reference JOURNAL] [--may-be-open]

Every request that was sent ends once. A call that ends with OK has each sample of each model once,
and its Usage. The chunks of a sample have neither gap nor repetition, and are the sample's tokens.
Divergences follow from the log-probabilities beside them. With `--reference`, a journal of the same
requests without faults, the same request with the same seed has the same tokens; what ended early
has a beginning of them. Exit code 1 where a rule is broken, 2 where a journal cannot be read.
"""

from __future__ import annotations

import argparse
import enum
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estimators.divergence import summarize
from loadtest.journal import OK, read_journal

WHOLE = ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")
# Of sums of divergences that are computed again, in nats; the wire carries doubles.
MAX_DIVERGENCE_ERROR = 1e-5
# Of a log-probability of the same token in another run, in nats.
MAX_LOGPROB_ERROR = 1e-6
_MAX_SHOWN = 20

Place = tuple[str, int]
"""A sample's model and index."""


class Fault(enum.Enum):
    """What is wrong with a journal."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    ALTERED = "altered"


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a request breaks."""

    fault: Fault
    request_id: str
    text: str

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.request_id}: {self.text}"


@dataclass(slots=True)
class _Request:
    """What a journal says of one id."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[Place, list[int]] = field(default_factory=dict)
    samples: dict[Place, list[dict[str, Any]]] = field(default_factory=dict)
    num_usages: int = 0
    codes: list[str] = field(default_factory=list)
    violations: list[tuple[Fault, str]] = field(default_factory=list)

    def take(self, event: Mapping[str, Any]) -> None:
        """Add an event, which must be at its place among the others."""
        kind = event["event"]
        if self.codes and kind != "sent":
            self.violations.append((Fault.DUPLICATED, f"{kind} behind the end of the call"))
        match kind:
            case "sent":
                self.sent.append(dict(event))
            case "tokens":
                self._take_tokens(event)
            case "sample":
                self.samples.setdefault(_place(event), []).append(dict(event))
            case "usage":
                self.num_usages += 1
            case "end":
                self.codes.append(event["code"])

    def _take_tokens(self, event: Mapping[str, Any]) -> None:
        place = _place(event)
        known = self.tokens.setdefault(place, [])
        position = event["position"]
        if position > len(known):
            text = f"{_named(place)}: tokens {len(known)} to {position - 1} did not come"
            self.violations.append((Fault.LOST, text))
        if position < len(known):
            text = f"{_named(place)}: token {position} came again"
            self.violations.append((Fault.DUPLICATED, text))
        if place in self.samples:
            text = f"{_named(place)}: tokens behind the whole sample"
            self.violations.append((Fault.DUPLICATED, text))
        known += event["token_ids"]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The verdict on a journal. `num_compared` samples were held against a reference."""

    num_requests: int
    num_samples: int
    num_compared: int
    codes: Counter[str]
    violations: list[Violation]

    def count(self, fault: Fault) -> int:
        """Return how many requests have this fault."""
        return len({v.request_id for v in self.violations if v.fault is fault})

    @property
    def is_balanced(self) -> bool:
        return not self.violations


def check(
    events: Iterable[Mapping[str, Any]],
    reference: Iterable[Mapping[str, Any]] = (),
    *,
    may_be_open: bool = False,
) -> Ledger:
    """Hold the events of a journal against the rules, and against a run without faults.

    `may_be_open` allows requests without an end: their client was killed.
    """
    requests = _by_id(events)
    expected = {
        (request.sent[0]["what"], place): samples[0]
        for request in _by_id(reference).values()
        if request.sent
        for place, samples in request.samples.items()
        if samples[0]["finish_reason"] in WHOLE
    }
    violations, num_compared = [], 0
    for request_id, request in requests.items():
        found = [*request.violations, *_check_ends(request, may_be_open), *_check_samples(request)]
        for sample, other in _pairs(request, expected):
            num_compared += 1
            found += _differences(sample, other)
        violations += [Violation(fault, request_id, text) for fault, text in found]
    return Ledger(
        num_requests=len(requests),
        num_samples=sum(len(samples) for r in requests.values() for samples in r.samples.values()),
        num_compared=num_compared,
        codes=Counter(code for request in requests.values() for code in request.codes),
        violations=violations,
    )


def _by_id(events: Iterable[Mapping[str, Any]]) -> dict[str, _Request]:
    requests: dict[str, _Request] = {}
    for event in events:
        requests.setdefault(event["id"], _Request()).take(event)
    return requests


Found = Iterator[tuple[Fault, str]]


def _check_ends(request: _Request, may_be_open: bool) -> Found:
    """Every id is sent once and ends once; what ended well is whole."""
    if not request.sent:
        yield Fault.ALTERED, "an answer to what was never sent"
        return
    if len(request.sent) > 1:
        yield Fault.DUPLICATED, f"sent {len(request.sent)} times under one id"
    if not request.codes and not may_be_open:
        yield Fault.LOST, "has no end"
    if len(request.codes) > 1:
        yield Fault.DUPLICATED, f"ended {len(request.codes)} times: {', '.join(request.codes)}"
    if request.codes[:1] == [OK]:
        yield from _check_whole(request)


def _check_whole(request: _Request) -> Found:
    sent = request.sent[0]
    places = {(role, index) for role in sent["roles"] for index in range(sent["num_samples"])}
    for place in sorted(places - request.samples.keys()):
        yield Fault.LOST, f"{_named(place)} did not come"
    for place in sorted(request.samples.keys() - places):
        yield Fault.DUPLICATED, f"{_named(place)} was not asked for"
    if request.num_usages == 0:
        yield Fault.LOST, "Usage did not come"
    if request.num_usages > 1:
        yield Fault.DUPLICATED, f"Usage came {request.num_usages} times"


def _check_samples(request: _Request) -> Found:
    """A sample comes once, has the tokens of its chunks, and a divergence that follows from it."""
    for place, samples in request.samples.items():
        if len(samples) > 1:
            yield Fault.DUPLICATED, f"{_named(place)} came {len(samples)} times"
        sample = samples[0]
        chunks = request.tokens.get(place)
        if chunks is not None and chunks != sample["token_ids"]:
            yield Fault.ALTERED, f"{_named(place)}: chunks and sample have other tokens"
        if sample["logprobs"] and len(sample["logprobs"]) != len(sample["token_ids"]):
            yield Fault.ALTERED, f"{_named(place)}: not one log-probability for each token"
        elif sample["divergence"] is not None and sample["logprobs"]:
            yield from _check_divergence(place, sample)


def _check_divergence(place: Place, sample: Mapping[str, Any]) -> Found:
    reported = sample["divergence"]
    theirs = reported["reference_logprobs"]
    if len(theirs) != len(sample["logprobs"]):
        yield Fault.ALTERED, f"{_named(place)}: not one reference log-probability for each token"
        return
    computed = summarize(sample["logprobs"], theirs)
    for name in ("num_tokens", "nonfinite_tokens", "k1_sum", "k2_sum", "k3_sum"):
        mine = getattr(computed, name)
        if not math.isclose(reported[name], mine, rel_tol=1e-9, abs_tol=MAX_DIVERGENCE_ERROR):
            text = f"{_named(place)}: {name} is {reported[name]}, its tokens give {mine}"
            yield Fault.ALTERED, text


def _pairs(
    request: _Request, expected: Mapping[tuple[str, Place], Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the samples, and the chunks of those that never came whole, that have a reference."""
    if not request.sent:
        return
    what = request.sent[0]["what"]
    for place in request.samples.keys() | request.tokens.keys():
        if (other := expected.get((what, place))) is not None:
            role, index = place
            part = {"role": role, "index": index, "finish_reason": "", "logprobs": []}
            chunks = {**part, "token_ids": request.tokens.get(place, [])}
            yield request.samples.get(place, [chunks])[0], other


def _differences(sample: Mapping[str, Any], other: Mapping[str, Any]) -> Found:
    """Say where a sample is not what the same request gave without faults."""
    name, num_tokens = _named(_place(sample)), len(sample["token_ids"])
    is_whole = sample["finish_reason"] in WHOLE
    wanted = other["token_ids"] if is_whole else other["token_ids"][:num_tokens]
    if sample["token_ids"] != wanted:
        yield Fault.ALTERED, f"{name}: other tokens than without faults"
        return
    if is_whole and sample["finish_reason"] != other["finish_reason"]:
        yield Fault.ALTERED, f"{name}: {sample['finish_reason']}, not {other['finish_reason']}"
    for mine, theirs in zip(sample["logprobs"], other["logprobs"], strict=False):
        if not math.isclose(mine, theirs, abs_tol=MAX_LOGPROB_ERROR):
            yield Fault.ALTERED, f"{name}: log-probability {mine}, without faults {theirs}"
            return


def _place(event: Mapping[str, Any]) -> Place:
    return event["role"], event["index"]


def _named(place: Place) -> str:
    return f"{place[0]} sample {place[1]}"


def render(ledger: Ledger) -> str:
    """Return the verdict as text."""
    codes = ", ".join(f"{code} {count}" for code, count in sorted(ledger.codes.items()))
    faults = ", ".join(f"{ledger.count(fault)} {fault.value}" for fault in Fault)
    shown = [f"  {violation}" for violation in ledger.violations[:_MAX_SHOWN]]
    hidden = len(ledger.violations) - len(shown)
    return "\n".join(
        [
            f"{ledger.num_requests} requests ({codes or 'none ended'}), {ledger.num_samples} "
            f"samples, {ledger.num_compared} compared with the reference",
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
    parser.add_argument("journals", nargs="+", type=Path, metavar="JOURNAL")
    parser.add_argument("--reference", type=Path, help="journal of the same without faults")
    parser.add_argument("--may-be-open", action="store_true", help="a client was killed")
    given = parser.parse_args(arguments)
    try:
        reference = read_journal([given.reference] if given.reference else [])
        ledger = check(read_journal(given.journals), reference, may_be_open=given.may_be_open)
    except (OSError, ValueError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    print(render(ledger))
    return 0 if ledger.is_balanced else 1


if __name__ == "__main__":
    sys.exit(main())
