"""What must hold of one request in a journal: in its order, as a whole, and against a reference."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from estimators.consensus import agreement, majority_vote
from estimators.divergence import summarize
from estimators.pass_at_k import pass_at_k
from loadtest.ledger.journal import DIVERGENCE_FIELDS, OK

WHOLE = ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")
NO_REASON = "FINISH_REASON_UNSPECIFIED"
# Of sums of divergences that are computed again, in nats; the wire carries doubles.
MAX_DIVERGENCE_ERROR = 1e-5
# Of a log-probability of the same token in another run, in nats.
MAX_LOGPROB_ERROR = 1e-6

Place = tuple[str, int]
"""A sample's model and index."""
Event = Mapping[str, Any]


class Fault(enum.Enum):
    """What is wrong with a journal."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    ALTERED = "altered"


Found = Iterator[tuple[Fault, str]]


@dataclass(slots=True)
class Chunks:
    """What the chunks of a sample brought together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    def add(self, event: Event) -> Found:
        """Add a chunk, which must go on where the last one ended."""
        name, position, num_known = named(place_of(event)), event["position"], len(self.token_ids)
        if position > num_known:
            yield Fault.LOST, f"{name}: tokens {num_known} to {position - 1} did not come"
        if position < num_known:
            yield Fault.DUPLICATED, f"{name}: token {position} came again"
        self.token_ids += event["token_ids"]
        self.logprobs += event["logprobs"]
        self.text += event["text"]


@dataclass(slots=True)
class Request:
    """What a journal says of one id, up to its end."""

    sent: list[Event] = field(default_factory=list)
    chunks: dict[Place, Chunks] = field(default_factory=dict)
    samples: dict[Place, list[Event]] = field(default_factory=dict)
    agreements: list[Event] = field(default_factory=list)
    usages: list[Event] = field(default_factory=list)
    code: str | None = None

    def take(self, event: Event) -> Found:
        """Add an event; yield what is wrong with its place among the others."""
        kind = event["event"]
        if self.usages and kind in ("tokens", "sample", "agreement"):
            yield Fault.DUPLICATED, f"{kind} behind Usage"
        match kind:
            case "sent":
                self.sent.append(event)
            case "tokens":
                if (place := place_of(event)) in self.samples:
                    yield Fault.DUPLICATED, f"{named(place)}: tokens behind the whole sample"
                yield from self.chunks.setdefault(place, Chunks()).add(event)
            case "sample":
                self.samples.setdefault(place_of(event), []).append(event)
            case "agreement":
                self.agreements.append(event)
            case "usage":
                self.usages.append(event)
            case "end":
                self.code = event["code"]
            case _:
                raise ValueError(f"no kind of event: {kind!r}")

    @property
    def num_early(self) -> int:
        """How many samples of a call that ended well did not."""
        samples = [sample for of_place in self.samples.values() for sample in of_place]
        return sum(self.code == OK and sample["finish_reason"] not in WHOLE for sample in samples)


def check_request(request: Request, *, may_be_open: bool) -> Found:
    """Yield what is wrong with a request that gets no more events."""
    if not request.sent:
        yield Fault.ALTERED, "an answer to what was never sent"
        return
    if len(request.sent) > 1:
        yield Fault.DUPLICATED, f"sent {len(request.sent)} times under one id"
    if request.code is None and not may_be_open:
        yield Fault.LOST, "has no end"
    sent = request.sent[0]
    places = {(role, index) for role in sent["roles"] for index in range(sent["num_samples"])}
    for place in sorted((request.samples.keys() | request.chunks.keys()) - places):
        yield Fault.DUPLICATED, f"{named(place)} was not asked for"
    if request.code == OK:
        for place in sorted(places - request.samples.keys()):
            yield Fault.LOST, f"{named(place)} did not come"
        if not request.usages:
            yield Fault.LOST, "Usage did not come"
    yield from _check_samples(request, sent)
    yield from _check_usage(request, sent)
    yield from _check_agreement(request, sent)


def _check_samples(request: Request, sent: Event) -> Found:
    """A sample comes once, has the tokens of its chunks, and a divergence that follows from it."""
    for place, samples in request.samples.items():
        name, sample = named(place), samples[0]
        if len(samples) > 1:
            yield Fault.DUPLICATED, f"{name} came {len(samples)} times"
        if sample["finish_reason"] == NO_REASON:
            yield Fault.ALTERED, f"{name} has no finish reason"
        if sent["max_tokens"] is not None and len(sample["token_ids"]) > sent["max_tokens"]:
            yield Fault.ALTERED, f"{name} has more tokens than were asked for"
        yield from _check_chunks(name, request.chunks.get(place), sample, sent)
        yield from _check_logprobs(name, sample)


def _check_chunks(name: str, chunks: Chunks | None, sample: Event, sent: Event) -> Found:
    """A stream brings all of a sample before it, everything else nothing."""
    if not sent["streams"]:
        if chunks is not None:
            yield Fault.DUPLICATED, f"{name}: chunks were not asked for"
        return
    chunks = chunks or Chunks()
    if chunks.token_ids != sample["token_ids"]:
        yield Fault.ALTERED, f"{name}: chunks and sample have other tokens"
    elif sample["finish_reason"] in WHOLE:
        if chunks.logprobs != sample["logprobs"]:
            yield Fault.ALTERED, f"{name}: chunks and sample have other log-probabilities"
        if chunks.text != sample["text"]:
            yield Fault.ALTERED, f"{name}: chunks and sample have other text"


def _check_logprobs(name: str, sample: Event) -> Found:
    mine, divergence = sample["logprobs"], sample["divergence"]
    theirs = divergence["reference_logprobs"] if divergence else []
    for values, what in ((mine, ""), (theirs, "reference ")):
        if values and len(values) != len(sample["token_ids"]):
            yield Fault.ALTERED, f"{name}: not one {what}log-probability for each token"
            return
        if not all(value <= MAX_LOGPROB_ERROR for value in values):  # nor is NaN
            yield Fault.ALTERED, f"{name}: a {what}log-probability is none"
            return
    if divergence and len(mine) != len(theirs):
        yield Fault.ALTERED, f"{name}: not one reference log-probability for each token"
    elif divergence and mine:
        computed = summarize(mine, theirs)
        wanted = {name: getattr(computed, name) for name in DIVERGENCE_FIELDS}
        yield from _compare_divergences(name, divergence, wanted, "its tokens give")


def _compare_divergences(name: str, mine: Event, wanted: Event, source: str) -> Found:
    for key in DIVERGENCE_FIELDS:
        if not _is_close(mine[key], wanted[key], MAX_DIVERGENCE_ERROR):
            yield Fault.ALTERED, f"{name}: {key} is {mine[key]}, {source} {wanted[key]}"


def _is_close(mine: float | None, wanted: float | None, max_error: float) -> bool:
    if mine is None or wanted is None:
        return mine is wanted
    return math.isclose(mine, wanted, rel_tol=1e-9, abs_tol=max_error)


def _check_usage(request: Request, sent: Event) -> Found:
    """Usage comes once, is of this request, and counts its tokens."""
    if len(request.usages) > 1:
        yield Fault.DUPLICATED, f"Usage came {len(request.usages)} times"
    for usage in request.usages[:1]:
        if usage["request_id"] != usage["id"] or usage["seed"] != sent["seed"]:
            text = f"Usage is of {usage['request_id']!r} with seed {usage['seed']}"
            yield Fault.ALTERED, f"{text}, which was sent with {sent['seed']}"
        counts = dict.fromkeys(sent["roles"], 0)
        for (role, _), samples in request.samples.items():
            counts[role] = counts.get(role, 0) + len(samples[0]["token_ids"])
        if usage["completion_tokens"] != counts:
            text = f"Usage counts tokens {usage['completion_tokens']}, its samples have {counts}"
            yield Fault.ALTERED, text


def _check_agreement(request: Request, sent: Event) -> Found:
    """Votes come once where they were asked for, and follow from the samples' answers."""
    found, is_wanted = request.agreements, sent["vote"] != "none"
    if not is_wanted and found:
        yield Fault.DUPLICATED, "an agreement was not asked for"
    if is_wanted and request.code == OK and not found:
        yield Fault.LOST, "the agreement did not come"
    if len(found) > 1:
        yield Fault.DUPLICATED, f"the agreement came {len(found)} times"
    for role in {"student", "teacher"} - set(sent["roles"]):
        if found and (found[0][role] or found[0][f"{role}_pass_at_k"]):
            yield Fault.ALTERED, f"{role} vote: it was not asked"
    if is_wanted and found and sent["vote"] != "other":
        yield from _check_votes(request, sent, found[0])


def _check_votes(request: Request, sent: Event, found: Event) -> Found:
    """Vote and count again; what a server could not decide has no vote, and is left out."""
    answers = {role: [s["answer"] for s in _of_role(request, role)] for role in sent["roles"]}
    votes = {role: majority_vote(of) for role, of in answers.items() if found[role] is not None}
    for role, vote in votes.items():
        for name, value in found[role].items():
            if value != getattr(vote, name):
                text = f"{role} vote: {name} is {value}, its answers give {getattr(vote, name)}"
                yield Fault.ALTERED, text
    are_both = votes.keys() == {"student", "teacher"}
    same = agreement(votes["student"], votes["teacher"]) if are_both else None
    if found["same_answer"] != same:
        yield Fault.ALTERED, f"same_answer is {found['same_answer']}, the votes give {same}"
    for role in sent["roles"]:
        samples = _of_role(request, role)
        right = [s["correct"] is True for s in samples]
        if sent["vote"] != "gold":
            best = votes["teacher"].answer if "teacher" in votes else None
            right = [best is not None and s["answer"] == best for s in samples]
        for k, value in found[f"{role}_pass_at_k"].items():
            wanted = pass_at_k(len(right), sum(right), int(k)) if int(k) <= len(right) else None
            if not _is_close(value, wanted, 1e-9):
                yield Fault.ALTERED, f"{role} pass@{k} is {value}, its answers give {wanted}"


def _of_role(request: Request, role: str) -> Sequence[Event]:
    return [samples[0] for (of_role, _), samples in request.samples.items() if of_role == role]


# -- against a run without faults ---------------------------------------------------------------


def pairs(request: Request, expected: Mapping[tuple[str, Place], Event]) -> Iterator[Any]:
    """Yield the samples, and the chunks of those that never came whole, that have a reference."""
    if not request.sent:
        return
    what = request.sent[0]["what"]
    for place in sorted(request.samples.keys() | request.chunks.keys()):
        if (other := expected.get((what, place))) is not None:
            role, index = place
            chunks = request.chunks.get(place, Chunks())
            part = {
                "role": role, "index": index, "finish_reason": "", "divergence": None,
                "token_ids": chunks.token_ids, "logprobs": chunks.logprobs,
            }  # fmt: skip
            yield request.samples.get(place, [part])[0], other


def differences(sample: Event, other: Event) -> Found:
    """Say where a sample is not what the same request gave without faults."""
    name, num_tokens = named(place_of(sample)), len(sample["token_ids"])
    is_whole = sample["finish_reason"] in WHOLE
    wanted = other["token_ids"] if is_whole else other["token_ids"][:num_tokens]
    if sample["token_ids"] != wanted:
        yield Fault.ALTERED, f"{name}: other tokens than without faults"
        return
    if is_whole:
        for key in ("finish_reason", "text", "answer", "correct"):
            if sample[key] != other[key]:
                yield Fault.ALTERED, f"{name}: {key} {sample[key]}, without faults {other[key]}"
        if len(sample["logprobs"]) != len(other["logprobs"]):
            yield Fault.LOST, f"{name}: log-probabilities did not come"
    yield from _other_logprobs(name, sample["logprobs"], other["logprobs"])
    mine, theirs = sample["divergence"], other["divergence"]
    if mine and theirs:
        key = "reference_logprobs"
        yield from _other_logprobs(name, mine[key], theirs[key])
        if is_whole:
            yield from _compare_divergences(name, mine, theirs, "without faults")
    elif theirs and is_whole and not sample["divergence_error"]:
        yield Fault.LOST, f"{name}: the divergence did not come, and no reason"


def _other_logprobs(name: str, mine: Sequence[float], theirs: Sequence[float]) -> Found:
    for one, other in zip(mine, theirs, strict=False):
        if not math.isclose(one, other, abs_tol=MAX_LOGPROB_ERROR):
            yield Fault.ALTERED, f"{name}: log-probability {one}, without faults {other}"
            return


def place_of(event: Event) -> Place:
    return event["role"], event["index"]


def named(place: Place) -> str:
    return f"{place[0]} sample {place[1]}"
