from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest.records import Phase, PlannedRequest, RequestRecord, SampleRecord
from loadtest.report import command_of, findings, gauges_of, render_report, write_report
from loadtest.requests_file import write_requests
from loadtest.summary import (
    Cell,
    Comparison,
    Distribution,
    Estimate,
    Histogram,
    Quality,
    Summary,
    Validity,
    to_json,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_page"
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
    "machine": "two cores",
    "command": ["tandem", "loadtest", "run", "--slo", "ttft_p95=0.2, itl_p95=0.02"],
    "timeline": {
        arm: [
            {"time_s": 0.5 * i, "waiting": i % 5, "running": i % 3, "batch": 1 + i % 4}
            for i in range(150)
        ]
        for arm in SPEED_S
    },
}


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
    plan = PlannedRequest(number, arm, load, block, number, f"p{number % 9}", 0, phase, due_s)
    gap_s = SPEED_S[arm] * (1 + load / 4)
    times_s = [due_s + 3 * gap_s + gap_s * i * chance.uniform(0.8, 1.3) for i in range(12)]
    times_s.sort()
    sample = SampleRecord(0, "STOP", list(range(12)), times_s, per_token_k3=[0.1] * 12)
    return RequestRecord(plan, due_s + 0.0004 * chance.random(), times_s[-1] + 0.001, "OK",
                         samples=[sample])  # fmt: skip


def around(value: float, half_width: float, n: int = 40) -> Estimate:
    return Estimate(value, value - half_width, value + half_width, n)


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
    return Cell(
        arm=arm,
        load=load,
        num_offered=len(mine),
        statuses={"OK": len(mine)},
        ttft=spread([r.ttft_s for r in mine if r.ttft_s is not None]),
        itl=spread(itls_s),
        tpot=spread([r.tpot_s for r in mine if r.tpot_s is not None]),
        e2e=spread([r.e2e_s for r in mine]),
        itl_histogram=Histogram(edges, tuple(counts)),
        throughput_rps=load,
        output_tokens_per_s=12 * load,
        goodput=around(0.95 if arm == "student" else 0.95 - load / 8, 0.04),
        quality=make_quality(arm),
    )


def make_comparison(load: float) -> Comparison:
    return Comparison(
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
    return Summary(
        config={**CONFIG, "arms": list(arms)},
        schedule_sha256="5ca1ab1e",
        versions={"tandem": "0.1.0"},
        models=({"name": "student", "precision": "int8"},),
        validity=Validity(True, (), 0.0004, 0.31),
        num_errors=0,
        cells=tuple(make_cell(arm, load, records) for load in loads for arm in arms),
        comparisons=tuple(make_comparison(load) for load in loads) if len(arms) > 1 else (),
        cross_check={"agrees": True},
    )


LOADS = (1.0, 2.0, 4.0)
RECORDS = make_records(LOADS)
SUMMARY = make_summary(RECORDS, LOADS)


def write_run(folder: Path, summary: Summary, records: list[RequestRecord]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(to_json(summary))
    (folder / "run.json").write_text(json.dumps(RUN))
    write_requests(folder / "requests.jsonl", records)
    return folder


def figures(page: str) -> list[str]:
    return re.findall(r'<figure[^>]* id="([^"]+)"', page)


def test_report_has_every_plot_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", SUMMARY, RECORDS))
    page = report.read_text()
    assert set(figures(page)) == set(PLOTS)
    assert page.count("<svg") == len(PLOTS)
    assert "<script" not in page
    assert not re.search(r"(src|href)=.https?:", page)


def test_headline_names_speed_and_quality_with_intervals() -> None:
    found = {finding.name: finding for finding in findings(SUMMARY, SUMMARY.comparisons[0])}
    text = render_report(SUMMARY, RUN, RECORDS)
    assert len(found) >= 4
    assert "3.1" in text and "[2.9, 3.3]" in text.replace("\u2009", " ")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Validity(False, ("the client used 93 % of a core",), 0.02, 0.93), "93 % of a core"),
        (Validity(True, (), 0.0004, 0.3), "7 "),
    ],
)
def test_verdict_comes_first(problem: Validity, words: str) -> None:
    summary = dataclasses.replace(SUMMARY, validity=problem, num_errors=7)
    page = render_report(summary, RUN, RECORDS)
    assert words in page[page.index("<body") :][:4000]


def without_quality(summary: Summary) -> Summary:
    cells = tuple(dataclasses.replace(cell, quality=None) for cell in summary.cells)
    return dataclasses.replace(summary, cells=cells, comparisons=())


def without_slo(summary: Summary) -> Summary:
    cells = tuple(dataclasses.replace(cell, goodput=None) for cell in summary.cells)
    return dataclasses.replace(summary, cells=cells, config={**CONFIG, "slo": ""})


def without_ok(summary: Summary) -> Summary:
    nothing = Distribution(0, None, None, None, None, None)
    cells = tuple(
        dataclasses.replace(
            cell, statuses={"UNAVAILABLE": cell.num_offered}, ttft=nothing, itl=nothing,
            tpot=nothing, e2e=nothing, itl_histogram=None, quality=None,
        )
        for cell in summary.cells
    )  # fmt: skip
    return dataclasses.replace(summary, cells=cells, comparisons=(), num_errors=99)


ONE = make_records((1.0,))
DEGENERATE = {
    "one load": (make_summary(ONE, (1.0,)), ONE),
    "one arm": (make_summary(RECORDS, LOADS, ("student",)), RECORDS),
    "no quality": (without_quality(SUMMARY), RECORDS),
    "no SLO": (without_slo(SUMMARY), RECORDS),
    "nothing OK": (without_ok(SUMMARY), []),
    "closed loop": (SUMMARY, make_records(LOADS, is_closed=True)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_what_is_missing_leaves_a_page_that_can_be_read(name: str) -> None:
    summary, records = DEGENERATE[name]
    page = render_report(summary, RUN, records)
    assert set(figures(page)) <= set(PLOTS)
    assert "None" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is not"):
        write_report(tmp_path)


def test_command_is_ready_for_a_shell() -> None:
    command = "tandem loadtest run --slo 'ttft_p95=0.2, itl_p95=0.02'"
    assert command_of(RUN) == command
    assert command_of({}) is None


def test_gauges_are_read_by_role() -> None:
    assert [g.time_s for g in gauges_of(RUN) if g.arm == "student"][:3] == [0.0, 0.5, 1.0]
    assert gauges_of({}) == []


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_browser_shows_every_plot_without_a_complaint(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", SUMMARY, RECORDS))
    done = subprocess.run([SCRIPT, report], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(done.stdout)["plots"]) == set(PLOTS)
