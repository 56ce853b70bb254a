from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest.analysis.summary import (
    Summary,
    Validity,
    to_json,
)
from loadtest.client.requests_file import write_requests
from loadtest.config import RunConfig
from loadtest.flags import flag_of, parse_config
from loadtest.records import RequestRecord
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
from tests.support.load_tests import NOTHING, around
from tests.support.loadtest.runs import (
    CONFIG,
    CROSS_CHECK,
    LOADS,
    PLOTS,
    RECORDS,
    RUN,
    SUMMARY,
    change,
    make_records,
    make_summary,
)
from tests.support.pages import assert_loads_nothing


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
