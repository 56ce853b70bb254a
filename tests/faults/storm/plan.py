"""What a storm does, drawn from a seed: the server, the weather, requests and their callers.

Which of two things is first is up to the machine; what may come of each call is known all the same.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from protos.tandem.v1 import inference_pb2 as pb
from tests.faults.storm.backend import MARK, Weather

TENANTS = ("ada", "bob")
NUM_TEMPLATES = 10
_SINGLE = (pb.ROUTE_STUDENT, pb.ROUTE_TEACHER)


class Manner(enum.Enum):
    """How a caller behaves."""

    READS = "reads to the end"
    LEAVES = "cancels behind some events"
    LEAVES_AT_ONCE = "cancels before anything was sent"
    HURRIES = "has a deadline of some milliseconds"
    COMPARES = "asks for everything in one message"
    SENDS_NOTHING = "closes its side without a message"


class Id(enum.Enum):
    """Whose a request id is besides."""

    OWN = "nobody's"
    SHARED = "of others, with the same content or with another one; operators abort it"
    TWIN = "of another tenant, with another content"


@dataclass(frozen=True, slots=True)
class Act:
    """One call: number `template` of the requests, under `request_id`, by a tenant."""

    number: int
    template: int
    tenant: str
    request_id: str
    id_kind: Id
    manner: Manner
    is_auto: bool
    num_events: int
    timeout_s: float
    num_attempts: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A server and a storm over it."""

    seed: int
    max_num_seqs: int
    max_waiting: int
    settings: dict[str, Any]
    weather: Weather
    templates: list[pb.GenerateRequest]
    num_callers: int
    is_teacher_remote: bool
    has_certificates: bool

    def acts(self) -> Iterator[Act]:
        """Yield calls without end."""
        rng = random.Random(f"acts {self.seed}")
        number = 0
        while True:
            yield _act(rng, number, self.templates)
            number += 1


def make_plan(seed: int) -> Plan:
    """Draw a plan."""
    rng = random.Random(seed)
    weather = Weather(
        out_of_memory=rng.choice([0, 0.02, 0.1]),
        failure=rng.choice([0, 0, 0.01]),
        has_nan=rng.random() < 0.7,
        pass_s=rng.choice([0, 0.0005, 0.003]),
    )
    return Plan(
        seed=seed,
        max_num_seqs=rng.randint(4, 8),
        max_waiting=rng.choice([2, 8, 64]),
        settings={
            "max_pass_tokens": rng.choice([16, 16, 24]),
            "max_replays": rng.choice([0, 2, 1000]),
            "replay_ttl_s": rng.choice([0.02, 60.0]),
            "max_shadows": rng.choice([1, 16]),
            "shadow_rate": rng.choice([0.0, 1.0]),
            "drain_grace_s": rng.choice([0.0, 0.05, 5.0]),
        },
        weather=weather,
        templates=[_template(rng) for _ in range(NUM_TEMPLATES)],
        num_callers=rng.choice([8, 24, 48]),
        is_teacher_remote=rng.random() < 0.4,
        has_certificates=rng.random() < 0.4,
    )


def _template(rng: random.Random) -> pb.GenerateRequest:
    """Return a request whose prompt shares its beginning with others, and may be long."""
    beginning = [7 + rng.randrange(2)] * rng.choice([2, 16, 28])
    prompt = [*beginning, *rng.choices(range(4, 40), k=rng.randint(0, 8))]
    if rng.random() < 0.25:
        prompt = [MARK, rng.randint(2, min(len(prompt) + 8, 39)), *prompt]
    return pb.GenerateRequest(
        route=rng.choice([*_SINGLE, *_SINGLE, pb.ROUTE_BOTH]),
        prompt_token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(
            num_samples=rng.choice([1, 1, 2, 4]),
            seed=rng.randrange(2**64),
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 0.7, 1.0]),
        ),
        output=pb.OutputOptions(stream=rng.random() < 0.7),
        divergence=pb.DivergenceOptions(enabled=False) if rng.random() < 0.4 else None,
    )


def _act(rng: random.Random, number: int, templates: list[pb.GenerateRequest]) -> Act:
    template, tenant = rng.randrange(len(templates)), rng.choice(TENANTS)
    id_kind = rng.choice([Id.OWN, Id.OWN, Id.SHARED, Id.SHARED, Id.TWIN])
    request_id = f"own-{number}"
    if id_kind is Id.SHARED:
        place = rng.randrange(6)
        request_id = f"shared-{place}-{number // 100}"
        if rng.random() < 0.85:
            template = (place + number // 100) % len(templates)
    if id_kind is Id.TWIN:
        # Two tenants, one id, each always with a content of its own.
        place = rng.randrange(4)
        request_id = f"twin-{place}"
        template = place + 4 * TENANTS.index(tenant)
    manner = rng.choices(list(Manner), [8, 4, 1, 2, 2, 1])[0]
    is_single = templates[template].route in _SINGLE
    return Act(
        number,
        template,
        tenant,
        request_id,
        id_kind,
        manner,
        is_auto=id_kind is Id.OWN and is_single and manner is Manner.READS and rng.random() < 0.5,
        num_events=rng.randint(0, 12),
        timeout_s=rng.uniform(0.001, 0.05),
        num_attempts=rng.choice([1, 1, 4]),
    )
