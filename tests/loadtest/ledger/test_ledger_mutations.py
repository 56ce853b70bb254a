"""One change, wherever it may be, to the journal of a real server: the ledger objects."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.divergence import summarize
from loadtest.ledger.journal import DIVERGENCE_FIELDS, read_journal
from loadtest.ledger.ledger import Ledger, check
from protos.tandem.v1 import inference_pb2 as pb
from tests.faults.rig import Rig, requests_of

Events = list[dict[str, Any]]
NUM_REQUESTS = 24
# What clients note for people, and bounds that a change of one need not break.
NOT_CHECKED = {
    "id", "event", "rpc", "prompt_sha256", "what", "roles", "vote", "max_tokens",
    "divergence_error",
}  # fmt: skip


def voting_requests() -> Iterator[pb.GenerateRequest]:
    """Yield requests of every kind, half of which vote; their seeds make all answers different."""
    for number, request in enumerate(requests_of(NUM_REQUESTS, seed=21)):
        request.sampling.temperature = 1.0
        request.sampling.max_tokens += 6
        if number % 2:
            request.evaluation.answer_format = "final_line"
            request.evaluation.pass_at_k.append(1)
        yield request


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Events, Events, Ledger]:
    """Return the events of the same requests in two runs, and the second one's ledger."""
    folder: Path = tmp_path_factory.mktemp("runs")
    with Rig(folder, max_replays=0) as rig:
        first, second = (list(read_journal([rig.drive(voting_requests(), n)])) for n in "ab")
    sound = check(second, first)
    assert sound.is_balanced and sound.num_early == 0 and sound.num_compared == sound.num_samples
    return first, second, sound


def is_objected_to(ledger: Ledger, sound: Ledger) -> bool:
    """Whether a ledger shows it; how calls end, and whether samples did, is for rows to judge."""
    return (
        not ledger.is_balanced or ledger.codes != sound.codes or ledger.num_early > sound.num_early
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all lists and of all that is neither list nor mapping."""
    if not isinstance(value, dict):
        yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from leaves(inner, (*path, key))


def altered(value: Any, rng: random.Random) -> Any:
    """Return another value, at the edge of what must be noticed."""
    match value:
        case bool():
            return not value
        case int():
            return value + rng.choice([-1, 1])
        case float():
            return rng.choice([value + 3e-5, value - 3e-5, float("nan")])
        case str():
            return value + "x"
        case []:
            return [1]
        case list():
            return rng.choice([value[:-1], value[1:], [*value, value[-1]]])
    return 1


def drop(events: Events, at: int, rng: random.Random) -> Events:
    return [*events[:at], *events[at + 1 :]]


def repeat(events: Events, at: int, rng: random.Random) -> Events:
    later = rng.randint(at, len(events))
    return [*events[:later], events[at], *events[later:]]


def alter(events: Events, at: int, rng: random.Random) -> Events:
    """Change one number, text or list of an event."""
    event = copy.deepcopy(events[at])
    *path, last = rng.choice([path for path in leaves(event) if path[0] not in NOT_CHECKED])
    inner: Any = event
    for key in path:
        inner = inner[key]
    inner[last] = altered(inner[last], rng)
    return [*events[:at], event, *events[at + 1 :]]


def rename(events: Events, at: int, rng: random.Random) -> Events:
    """Put an event under another id: one that is there, or none."""
    ids = sorted({event["id"] for event in events} - {events[at]["id"]} | {"nobody's"})
    return [*events[:at], events[at] | {"id": rng.choice(ids)}, *events[at + 1 :]]


def swap_answers(events: Events, at: int, rng: random.Random) -> Events:
    """Give all that came for one request to another one of the same kind, Usage with its id."""
    shapes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for event in events:
        if event["event"] == "sent":
            shapes[tuple(event["roles"]), event["num_samples"]].append(event["id"])
    one, other = rng.sample(rng.choice([ids for ids in shapes.values() if len(ids) > 1]), 2)
    seeds = {e["id"]: e["seed"] for e in events if e["event"] == "sent"}
    names = {one: other, other: one}
    return [
        _renamed(e, names[e["id"]], seeds) if e["event"] != "sent" and e["id"] in names else e
        for e in events
    ]


def _renamed(event: dict[str, Any], name: str, seeds: dict[str, int]) -> dict[str, Any]:
    usage = {"request_id": name, "seed": seeds[name]} if event["event"] == "usage" else {}
    return event | {"id": name, **usage}


def cut_at_a_chunk(events: Events, at: int, rng: random.Random) -> Events:
    """End a sample a chunk earlier, with everything else as it would be."""
    chunk = rng.choice([e for e in events if e["event"] == "tokens" and e["position"] > 0])
    mine = [e for e in events if e["id"] == chunk["id"]]
    place = chunk["role"], chunk["index"], chunk["id"]
    cut = []
    for event in copy.deepcopy(events):
        if (event.get("role"), event.get("index"), event["id"]) == place:
            if event.get("position", -1) >= chunk["position"]:
                continue
            if event["event"] == "sample":
                num_cut = len(event["token_ids"]) - chunk["position"]
                _cut_sample(event, chunk["position"], mine)
        cut.append(event)
    for event in cut:
        if event["event"] == "usage" and event["id"] == chunk["id"]:
            event["completion_tokens"][chunk["role"]] -= num_cut
    return cut


def _cut_sample(sample: dict[str, Any], num_tokens: int, events: Events) -> None:
    sample["finish_reason"] = "FINISH_REASON_LENGTH"
    sample["token_ids"] = sample["token_ids"][:num_tokens]
    sample["logprobs"] = sample["logprobs"][:num_tokens]
    sample["text"] = "".join(
        e["text"]
        for e in events
        if e["event"] == "tokens"
        and (e["role"], e["index"]) == (sample["role"], sample["index"])
        and e["position"] < num_tokens
    )
    if divergence := sample["divergence"]:
        theirs = divergence["reference_logprobs"][:num_tokens]
        summary = summarize(sample["logprobs"], theirs)
        divergence |= {name: getattr(summary, name) for name in DIVERGENCE_FIELDS}
        divergence["reference_logprobs"] = theirs


CHANGES = (drop, repeat, alter, rename, swap_answers, cut_at_a_chunk)


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), place=st.floats(0, 1, exclude_max=True))
def test_one_change_is_objected_to(
    runs: tuple[Events, Events, Ledger],
    change: Callable[[Events, int, random.Random], Events],
    seed: int,
    place: float,
) -> None:
    reference, events, sound = runs
    changed = change(events, int(place * len(events)), random.Random(seed))
    assert is_objected_to(check(changed, reference), sound)
