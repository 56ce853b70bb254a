"""A whole load test of two arms, as its page gets it: the summary, run.json and the records."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

from loadtest.analysis.summary import (
    ArmComparison,
    Cell,
    Distribution,
    Histogram,
    Quality,
    Summary,
    Validity,
)
from loadtest.records import Phase, RequestRecord, SampleRecord
from tests.support.load_tests import around, cell_of, planned, recorded, summary_of

PLOTS = ("pareto", "latency", "goodput", "itl", "kl", "kl_position", "pass_at_k", "timeline")
CONFIG: dict[str, object] = {
    "target": "127.0.0.1:50051",
    "arms": ["student", "teacher"],
    "arrival": "poisson",
    "rates_rps": [1.0, 2.0, 4.0],
    "slo": "ttft_p95=0.2,itl_p95=0.02",
    "seed": 0,
}
SPEED_S = {"student": 0.01, "teacher": 0.03}
RUN: dict[str, Any] = {
    "machine": {"num_cpus": 2, "system": "Linux"},
    "is_interrupted": False,
    "command": ["tandem", "loadtest", "run", "--slo", "ttft_p95=0.2, itl_p95=0.02"],
    "timeline": {
        arm: [
            {"time_s": 0.5 * i, "waiting": i % 5, "running": i % 3, "batch": 1 + i % 4}
            for i in range(150)
        ]
        for arm in SPEED_S
    },
}


CROSS_CHECK: dict[str, object] = {
    "agrees": True,
    "ttft": [
        {
            "arm": "student", "quantile": 0.95, "client_s": 0.157, "server_low_s": 0.1,
            "server_high_s": None, "num_buckets_apart": 0, "count": 152, "agrees": True,
        }
    ],
    "counts": [{"arm": "teacher", "client": {"OK": 19}, "server": {"OK": 19}, "agrees": True}],
}  # fmt: skip


def make_records(loads: tuple[float, ...], is_closed: bool = False) -> list[RequestRecord]:
    """Return a run of 5 s turns whose token times follow from the arm, the load and chance."""
    chance = random.Random(0)
    records: list[RequestRecord] = []
    start_s, block = 0.0, 0
    for load, phase in [(loads[0], Phase.WARMUP), *((load, Phase.MEASURED) for load in loads)]:
        for _ in range(2):
            for arm in chance.sample(list(SPEED_S), 2):
                for number in range(round(5 * load)):
                    due_s = start_s + 5 * number / round(5 * load)
                    records.append(
                        make_record(len(records), arm, load, block, phase, due_s, chance)
                    )
                    if is_closed:
                        plan = records[-1].plan
                        records[-1].plan = dataclasses.replace(
                            plan, intended_s=None, rate_rps=None, concurrency=round(load)
                        )
                start_s, block = start_s + 6, block + 1
    return records


def make_record(
    number: int, arm: str, load: float, block: int, phase: Phase, due_s: float, chance: Any
) -> RequestRecord:
    prompt_id = f"p{number % 9}"
    plan = planned(
        number, arm, rate_rps=load, block=block, prompt_id=prompt_id, phase=phase, intended_s=due_s
    )
    gap_s = SPEED_S[arm] * (1 + load / 4)
    times_s = [due_s + 3 * gap_s + gap_s * i * chance.uniform(0.8, 1.3) for i in range(12)]
    times_s.sort()
    sample = SampleRecord(0, "STOP", list(range(12)), times_s, per_token_k3=[0.1] * 12)
    sent_s, ended_s = due_s + 0.0004 * chance.random(), times_s[-1] + 0.001
    return recorded(plan, sent_s=sent_s, ended_s=ended_s, samples=[sample])


def spread(values: list[float]) -> Distribution:
    """Return percentiles by rank, p99 only where something is above it."""
    ranked = sorted(values)
    p50, p90, p95, p99 = (
        around(ranked[int(q * len(ranked))], 0.002, len(ranked)) for q in (0.5, 0.9, 0.95, 0.99)
    )
    mean_s = sum(ranked) / len(ranked)
    return Distribution(len(ranked), mean_s, p50, p90, p95, p99 if len(ranked) > 99 else None)


def make_quality(arm: str) -> Quality:
    edges = (0.0, *(10 ** (i / 4 - 4) for i in range(17)))
    skill = 0.4 if arm == "teacher" else 0.35
    return Quality(
        pass_at_k={k: around(1 - (1 - skill) ** k, 0.06) for k in (1, 2, 4, 8)},
        majority_correct=around(skill + 0.05, 0.07),
        k3=around(0.21, 0.02),
        exact_kl=around(0.2, 0.01),
        k3_histogram=Histogram(edges, tuple(1 + i * (17 - i) for i in range(17))),
        k3_by_position=tuple(around(0.15 + 0.002 * i, 0.03) for i in range(64)),
    )


def make_cell(arm: str, load: float, records: list[RequestRecord]) -> Cell:
    mine = [
        r for r in records
        if (r.plan.arm, r.plan.load, r.plan.phase) == (arm, load, Phase.MEASURED)
    ]  # fmt: skip

    edges = (0.0, *(10 ** (i / 10 - 3) for i in range(21)))
    itls_s = [itl for r in mine for itl in r.itls_s]
    counts = [sum(low <= x < high for x in itls_s) for low, high in itertools.pairwise(edges)]
    return cell_of(
        arm,
        load,
        num_offered=len(mine),
        statuses={"OK": len(mine)},
        ttft=spread([r.ttft_s for r in mine if r.ttft_s is not None]),
        itl=spread(itls_s),
        tpot=spread([r.tpot_s for r in mine if r.tpot_s is not None]),
        e2e=spread([r.e2e_s for r in mine]),
        itl_histogram=Histogram(edges, tuple(counts)),
        output_tokens_per_s=12 * load,
        goodput=around(0.95 if arm == "student" else 0.95 - load / 8, 0.04),
        quality=make_quality(arm),
    )


def make_comparison(load: float) -> ArmComparison:
    return ArmComparison(
        load=load,
        arm_a="student",
        arm_b="teacher",
        num_pairs=40,
        ratios={"ttft_p50": around(3.1, 0.2), "e2e_p50": around(1.05, 0.2)},
        differences={"pass@1": around(-0.05, 0.03), "pass@8": around(0.01, 0.04)},
        mcnemar_p=0.031,
        agreement=around(0.7, 0.1),
    )


def make_summary(
    records: list[RequestRecord], loads: tuple[float, ...], arms: tuple[str, ...] = tuple(SPEED_S)
) -> Summary:
    return summary_of(
        *(make_cell(arm, load, records) for load in loads for arm in arms),
        config={**CONFIG, "arms": list(arms)},
        schedule_sha256="5ca1ab1e",
        versions={"tandem": "0.1.0"},
        models=({"name": "student", "precision": "int8"},),
        validity=Validity(True, (), 0.0004, 0.31),
        comparisons=tuple(make_comparison(load) for load in loads) if len(arms) > 1 else (),
        cross_check=CROSS_CHECK,
    )


LOADS = (1.0, 4.0)
RECORDS = make_records(LOADS)
SUMMARY = make_summary(RECORDS, LOADS)


def change(summary: Summary, **values: Any) -> Summary:
    """Return the summary of one load, its cells with these values."""
    cells = tuple(dataclasses.replace(cell, **values) for cell in summary.cells[:2])
    return dataclasses.replace(summary, cells=cells, comparisons=summary.comparisons[:1])
