from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from estimators.estimate import Estimate
from loadtest.analysis.summary import (
    ArmComparison,
    Cell,
    Distribution,
    Histogram,
    Quality,
    Summary,
    Validity,
    to_json,
)
from loadtest.client.requests_file import write_requests
from loadtest.config import RunConfig
from loadtest.flags import flag_of, parse_config
from loadtest.records import Phase, PlannedRequest, RequestRecord, SampleRecord
from loadtest.report.page import (
    command_of,
    findings,
    gauges_of,
    headlines,
    render_report,
    write_report,
)
from loadtest.report.timeline import Gauge
from report.formats import NBSP
from tests.support.pages import assert_loads_nothing

SCRIPT = Path(__file__).parents[3] / "scripts" / "check_page"
BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
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
    return Summary(
        config={**CONFIG, "arms": list(arms)},
        schedule_sha256="5ca1ab1e",
        versions={"tandem": "0.1.0"},
        models=({"name": "student", "precision": "int8"},),
        validity=Validity(True, (), 0.0004, 0.31),
        num_errors=0,
        cells=tuple(make_cell(arm, load, records) for load in loads for arm in arms),
        comparisons=tuple(make_comparison(load) for load in loads) if len(arms) > 1 else (),
        cross_check=CROSS_CHECK,
    )


LOADS = (1.0, 4.0)
RECORDS = make_records(LOADS)
SUMMARY = make_summary(RECORDS, LOADS)
NOTHING = Distribution(0, None, None, None, None, None)


def change(summary: Summary, **values: Any) -> Summary:
    """Return the summary of one load, its cells with these values."""
    cells = tuple(dataclasses.replace(cell, **values) for cell in summary.cells[:2])
    return dataclasses.replace(summary, cells=cells, comparisons=summary.comparisons[:1])


def write_run(folder: Path, summary: Summary, records: list[RequestRecord]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(to_json(summary), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    write_requests(folder / "requests.jsonl", records)
    return folder


def figures(page: str) -> list[str]:
    return re.findall(r'<figure[^>]* id="([^"]+)"', page)


def text_of(page: str) -> str:
    """Return what a reader sees besides the plots."""
    body = re.sub(r"<svg.*?</svg>", "", page[page.index("<body") :], flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")
    return re.sub(r"\s+", " ", text)


@functools.cache
def full_page() -> str:
    return render_report(SUMMARY, RUN, RECORDS)


def quick_text(summary: Summary, run: dict[str, Any] | None = None) -> str:
    """Return the text of a page without anything to draw."""
    return text_of(render_report(dataclasses.replace(summary, cells=()), run or {}, []))


# --- the page


def test_report_is_written_beside_the_artifacts_it_is_made_from(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SUMMARY, RECORDS)
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == full_page()


def test_page_has_every_plot_and_loads_nothing() -> None:
    page = full_page()
    assert figures(page) == list(PLOTS)
    assert page.count("<svg") == page.count("<figcaption>") == len(PLOTS)
    assert_loads_nothing(page)


def test_what_users_and_servers_name_is_text_and_never_markup() -> None:
    config = {**CONFIG, "slo": "<script>alert(1)</script>"}
    page = render_report(dataclasses.replace(SUMMARY, cells=(), config=config), {}, [])
    assert "<script" not in page
    assert "<script>alert(1)</script>" in text_of(page)


# --- verdict and headline


def test_failures_come_before_the_verdict_and_the_verdict_before_the_rest() -> None:
    problems = ("the client used 93 % of a core", "send lag p99 is 4 ms")
    summary = change(
        SUMMARY, statuses={"OK": 1, "INTERNAL": 4, "RESOURCE_EXHAUSTED": 2}, itl_histogram=None,
        ttft=NOTHING, itl=NOTHING, e2e=NOTHING, goodput=None, quality=None, num_offered=7,
    )  # fmt: skip
    summary = dataclasses.replace(summary, validity=Validity(False, problems, 0.004, 0.93))
    text = text_of(render_report(summary, {}, []))
    expected = (
        "14 requests failed: 8 errors, 4 rejections",
        "INVALID. the client used 93 % of a core; send lag p99 is 4 ms.",
        "1 Headline",
    )
    places = [text.find(words) for words in expected]
    assert places == sorted(places) and places[0] > 0, text[:800]


def test_valid_run_without_failures_says_how_well_the_client_kept_up() -> None:
    text = quick_text(SUMMARY)
    assert "VALID. The client kept up: 99 % of requests were sent within 0.4 ms" in text
    assert "used 31.0% of a core" in text
    assert "INVALID" not in text and "failed" not in text


def test_disagreement_with_the_server_is_said_on_top() -> None:
    check = {**CROSS_CHECK, "agrees": False}
    text = quick_text(dataclasses.replace(SUMMARY, cross_check=check))
    assert text.index("Client and server disagree") < text.index("1 Headline")
    assert "disagree" not in quick_text(SUMMARY)


def test_findings_say_what_the_intervals_leave_no_doubt_of() -> None:
    found = [(f.name, f.text, f.meaning) for f in findings(SUMMARY, SUMMARY.comparisons[0])]
    assert [tuple(each.replace(NBSP, " ") for each in row) for row in found] == [
        ("first token, median", "3.1× [2.9, 3.3]", "faster"),
        ("end to end, median", "1.05× [0.85, 1.25]", "not significant"),
        ("pass@1", "−5.0 points [−8.0, −2.0]", "worse"),
        ("pass@8", "+1.0 points [−3.0, +5.0]", "not significant"),
        ("McNemar's p of the correctness", "0.031", ""),
        ("agreement of the majorities", "70.0% [60.0%, 80.0%]", ""),
        ("exact KL(student ‖ teacher), nats per token", "0.2 [0.19, 0.21]", ""),
        ("k3 estimate of KL(student ‖ teacher), nats per token", "0.21 [0.19, 0.23]", ""),
    ]


def test_quality_that_was_not_measured_is_a_finding() -> None:
    bare = dataclasses.replace(
        SUMMARY.comparisons[0], differences={}, agreement=None, mcnemar_p=None
    )
    found = findings(change(SUMMARY, quality=None), bare)
    assert {f.name: f.text for f in found[2:]} == {
        "pass@k": "not measured",
        "agreement of the majorities": "not measured",
        "exact KL(student ‖ teacher), nats per token": "not measured",
        "k3 estimate of KL(student ‖ teacher), nats per token": "not measured",
    }


def test_headline_has_a_column_per_load_and_gaps_where_a_load_lacks_a_number() -> None:
    first, second = SUMMARY.comparisons
    second = dataclasses.replace(second, ratios={"ttft_p50": around(0.5, 0.1)}, num_pairs=7)
    summary = dataclasses.replace(SUMMARY, comparisons=(first, second))
    (headline,) = headlines(summary)
    assert (headline.loads, headline.num_pairs) == (LOADS, (40, 7))
    rows = dict(headline.rows)
    assert [f and f.meaning for f in rows["first token, median"]] == ["faster", "slower"]
    assert [f and f.meaning for f in rows["end to end, median"]] == ["not significant", None]


def test_every_pair_of_arms_has_a_headline_of_its_own() -> None:
    other = dataclasses.replace(SUMMARY.comparisons[0], arm_b="third")
    summary = dataclasses.replace(SUMMARY, comparisons=(*SUMMARY.comparisons, other))
    assert [(h.arm_b, len(h.loads)) for h in headlines(summary)] == [("teacher", 2), ("third", 1)]


# --- what is missing


MISSING = {
    "one arm": (
        make_summary(RECORDS, LOADS[:1], ("student",)),
        "Not measured: a comparison",
        set(),
    ),
    "no quality": (
        change(SUMMARY, quality=None),
        "Not measured: right and wrong answers",
        {"pareto", "kl", "kl_position", "pass_at_k"},
    ),
    "no SLO": (
        dataclasses.replace(change(SUMMARY, goodput=None), config={**CONFIG, "slo": ""}),
        "Not measured: goodput, since no SLO was given",
        {"goodput"},
    ),
    "nothing OK": (
        change(
            SUMMARY, statuses={"UNAVAILABLE": 5}, ttft=NOTHING, itl=NOTHING, tpot=NOTHING,
            e2e=NOTHING, itl_histogram=None, quality=None,
        ),
        "Not measured: latency of any answered request",
        {"pareto", "latency", "itl", "kl", "kl_position", "pass_at_k"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_and_the_rest_is_drawn(name: str) -> None:
    summary, words, missing = MISSING[name]
    page = render_report(summary, {}, [r for r in RECORDS if r.plan.load == 1])
    assert set(figures(page)) == set(PLOTS) - missing
    assert words in text_of(page)
    assert "None" not in text_of(page)


def test_run_without_any_request_is_a_page_without_plots() -> None:
    page = render_report(dataclasses.replace(SUMMARY, cells=(), comparisons=()), {}, [])
    assert figures(page) == []
    assert text_of(page).count("Not measured") >= 8


def test_reason_why_there_is_no_divergence_is_told() -> None:
    text = quick_text(SUMMARY, {"divergence_problem": "only a Tandem server scores"})
    assert "Not measured: divergence: only a Tandem server scores." in text


def test_closed_loop_is_labelled_and_its_loads_are_requests_at_a_time() -> None:
    records = make_records((4.0,), is_closed=True)
    summary = make_summary(records, (4.0,))
    summary = dataclasses.replace(summary, config={**CONFIG, "arrival": "closed"})
    page = render_report(summary, {}, records)
    assert "Closed loop:" in text_of(page)
    assert "concurrency 4" in page and "rps" not in text_of(page).replace("rates_rps", "")
    assert "Closed loop:" not in quick_text(SUMMARY)


# --- numbers and conditions


def test_tables_have_the_count_behind_percentiles_and_say_where_it_is_too_small() -> None:
    text = text_of(full_page())
    first_token = text[text.index("Time to first token load") : text.index("Between tokens load")]
    cell = SUMMARY.cells[0]
    assert f"1 rps student {cell.ttft.count} " in first_token
    assert "too few" in first_token


def test_conditions_name_settings_schedule_models_machine_and_versions() -> None:
    text = text_of(full_page())
    for words in (
        "rates_rps 1.0, 2.0, 4.0",
        "schedule (SHA-256) 5ca1ab1e",
        "precision int8",
        "machine num_cpus 2, system Linux",
        "is_interrupted no",
        "tandem 0.1.0",
        "teacher requests OK 19 OK 19 ✓ agrees",
        "first token, p95 of 152 157 ms 100 ms to more ✓ agrees",
    ):
        assert words in text, words


def test_command_is_the_one_that_was_given_ready_for_a_shell() -> None:
    expected = "tandem loadtest run --slo 'ttft_p95=0.2, itl_p95=0.02'"
    assert command_of(RUN) == expected
    assert expected in text_of(full_page())


def test_run_from_python_is_repeated_by_the_command_that_it_amounts_to() -> None:
    config = RunConfig(out=Path("runs/a b"), rates_rps=(0.5, 2), duration_s=15, seed=3)
    run = {"command": ["tandem"], "config": config.model_dump(mode="json")}
    words = shlex.split(command_of(run))
    assert words[:3] == ["tandem", "loadtest", "run"]
    flags = dict.fromkeys(RunConfig.model_fields) | {
        next(n for n in RunConfig.model_fields if flag_of(n) == flag): value
        for flag, value in zip(words[3::2], words[4::2], strict=True)
    }
    assert parse_config(flags) == config


def test_gauges_are_read_by_role() -> None:
    each = {"time_s": 1.5, "waiting": 3, "running": 2, "batch": 8}
    assert gauges_of({"timeline": {"teacher": [each]}}) == [Gauge("teacher", 1.5, 3, 2, 8)]
    assert gauges_of({}) == []


# --- errors


def test_folder_without_a_summary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json cannot be read"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "not what a run writes"), ("[]", "is no JSON object")],
)
def test_broken_run_json_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    folder = write_run(tmp_path / "run", SUMMARY, [])
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"run\.json.*{message}"):
        write_report(folder)


# --- in a browser


def check_page(page: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([SCRIPT, page], capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_browser_shows_every_plot_without_a_complaint(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(full_page(), encoding="utf-8")
    returncode, found = check_page(page)
    assert found["problems"] == []
    assert (returncode, found["plots"]) == (0, list(PLOTS))


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_browser_check_finds_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        """<html><head><meta http-equiv="Content-Security-Policy" content="default-src 'none'">
        </head><body><img src="nowhere.png"><figure id="a"><svg width="400" height="200">
        <text x="9" y="50">over</text><text x="12" y="52">under</text><text x="390" y="90">out of
        it</text></svg></figure><figure id="b"><svg width="400" height="20"></svg></figure>
        </body></html>""",
        encoding="utf-8",
    )
    returncode, found = check_page(page)
    problems = "\n".join(found["problems"])
    assert returncode == 1
    for words in (
        'plot a: "under" covers "over"', "leaves the plot", "plot b does not show",
        "plot b has no text", "Content Security Policy",
    ):  # fmt: skip
        assert words in problems


def test_browser_check_without_a_browser_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "report.html"],
        capture_output=True, text=True, timeout=60, check=False, env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no browser: none of chromium" in done.stderr
