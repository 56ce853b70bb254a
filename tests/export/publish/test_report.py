from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from estimators.estimate import Estimate
from export.publish.plots import Hop, LossTerm, PhaseCurves, RemovedLayer
from export.publish.report import (
    MAX_PROMPTS,
    AcceptCounts,
    Flips,
    GateResult,
    ModelRow,
    ModelSize,
    PromptComparison,
    ReportData,
    StageCost,
    TaskRow,
    TaskScores,
    render_report,
    write_report,
)
from report.formats import NBSP
from tests.support.pages import Page, assert_loads_nothing

SECTIONS = (
    "verdict", "waterfall", "pareto", "losses", "layers",
    "data", "tasks", "variants", "prompts", "resources",
)  # fmt: skip


def gate(name: str, measured: float | None, threshold: float) -> GateResult:
    is_passed = measured is not None and measured <= threshold
    return GateResult(name, measured, threshold, is_passed, "nats per token")


FP32 = ModelRow(
    "fp32",
    gates=(gate("kl_to_teacher", 0.3113, 0.4), gate("parity_with_torch", 1.2e-9, 1e-6)),
    is_on_front=True,
    kl_to_teacher=Estimate(0.3113, 0.29, 0.34),
    step_s=0.02,
)
INT8 = ModelRow(
    "int8",
    gates=(gate("kl_to_teacher", 0.3127, 0.4), gate("kl_to_float_student", 0.0021, 0.02)),
    is_default=True,
    is_on_front=True,
    size_bytes=142_345_678,
    kl_to_teacher=Estimate(0.3127, 0.291, 0.3415),
    kl_to_teacher_p99=2.8,
    kl_to_student=Estimate(0.0021),
    argmax_agreement_with_teacher=0.758,
    argmax_agreement_with_student=0.994,
    flips=Flips(21, 5321, 0.12, 0.61, 2.4),
    perplexity=12.33,
    prefill_s=0.03,
    step_s=0.01,
    peak_memory_bytes=256_200_000,
)
INT4 = ModelRow(
    "int4",
    gates=(gate("kl_to_teacher", 0.9, 0.4), gate("kl_to_float_student", None, 0.02)),
    kl_to_teacher=Estimate(0.9),
    step_s=0.008,
)
FULL = ReportData(
    title="Small teacher, smaller student",
    variants=(FP32, INT8, INT4),
    conditions=(("hardware", "two cores"), ("seeds", "sample 7")),
    teacher=ModelSize("teacher-135M", 134_515_008, 30),
    student=ModelSize("student-24", 113_273_280, 24),
    references=(ModelRow("torch", step_s=0.025), ModelRow("transformers", step_s=0.035)),
    hops=(
        Hop("teacher", 0.0),
        Hop("pruned", 1.052),
        Hop("after phase 1", 0.3113),
        Hop("ONNX fp32", 0.3113),
        Hop("int8", 0.3127, after="ONNX fp32"),
        Hop("int4", 0.9, after="ONNX fp32"),
        Hop("bf16", None, after="ONNX fp32"),
    ),
    phases=(
        PhaseCurves(
            "soft KD", (1, 2), (LossTerm("forward KL", (1.5, 0.75)),), (1e-4, 2e-4), (0.1, 0.2)
        ),
        PhaseCurves("on-policy", (1, 2), (LossTerm("reverse KL", (0.5, 0.25)),)),
    ),
    removed_layers=(RemovedLayer(12, 0.081), RemovedLayer(17, 0.19)),
    accept_counts=AcceptCounts(60, (("wrong_answer", 30), ("truncated", 10)), (3, 1, 6)),
    task_scores=TaskScores(
        8,
        (1, 4),
        (
            TaskRow("sums", "teacher", 32, (Estimate(0.41, 0.33, 0.49), Estimate(0.7, 0.6, 0.8))),
            TaskRow("sums", "int8", 32, (Estimate(0.4), Estimate(0.6)), Estimate(0.45, 0.4, 0.5)),
        ),
    ),
    comparisons=(
        PromptComparison("What is 2+2?", "It is 4.", "It is 5.", 1.25),
        PromptComparison("Hello", "Hi there", "Hi", 2.5, (("Hi", 0.0), (" there", 3.0))),
    ),
    stages=(StageCost("sample", 1834.2, 1_900_000_000, 3_100_000), StageCost("evaluate", 45.25)),
)
BARE = ReportData("Bare", (ModelRow("fp32"),))


@pytest.fixture(scope="module")
def full_html() -> str:
    return render_report(FULL)


@pytest.fixture(scope="module")
def full(full_html: str) -> Page:
    return Page(full_html)


@pytest.fixture(scope="module")
def bare() -> Page:
    return Page(render_report(BARE))


def replace(**changes: Any) -> ReportData:
    """Return the bare report with some parts filled: no plots, so fast."""
    return dataclasses.replace(BARE, **changes)


# --- the page


@pytest.mark.parametrize("page", ["full", "bare"])
def test_page_has_every_section_and_says_how_to_read_it(
    page: str, request: pytest.FixtureRequest
) -> None:
    parsed = request.getfixturevalue(page)
    assert tuple(a["id"] for tag, a in parsed.tags if tag == "section") == SECTIONS
    for section in SECTIONS:
        assert "How to read this." in parsed.section(section)


def test_page_loads_nothing_and_its_contents_are_its_sections(full: Page, full_html: str) -> None:
    assert_loads_nothing(full_html)
    links = [a["href"] or "" for tag, a in full.tags if tag == "a" and "href" in a]
    assert [link.removeprefix("#") for link in links] == list(SECTIONS)


def test_same_data_give_the_same_bytes(tmp_path: Path, full_html: str) -> None:
    write_report(tmp_path / "report.html", FULL)
    assert (tmp_path / "report.html").read_bytes() == full_html.encode()


def test_every_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>&amp;"
    html = render_report(
        ReportData(
            evil,
            (dataclasses.replace(INT8, name=evil, gates=(gate(evil, 0.1, 0.2),)),),
            conditions=((evil, evil),),
            teacher=ModelSize(evil, 1, 1),
            student=ModelSize(evil, 1, 1),
            references=(ModelRow(evil, step_s=1.0),),
            hops=(Hop(evil, 0.1), Hop(evil + "2", None)),
            phases=(PhaseCurves(evil, (1,), (LossTerm(evil, (1.0,), evil),)),),
            accept_counts=AcceptCounts(1, ((evil, 1),)),
            task_scores=TaskScores(1, (1,), (TaskRow(evil, evil, 1, (Estimate(0.5),)),)),
            comparisons=(
                PromptComparison(evil, evil, evil, 1.0),
                PromptComparison(evil, evil, evil, 1.0, ((evil, 1.0),)),
            ),
            stages=(StageCost(evil),),
        )
    )
    assert "<script" not in html
    page = Page(html)
    assert page.section("prompts").count(evil) == 6
    for section in set(SECTIONS) - {"layers"}:
        assert evil in page.section(section)


# --- what is missing


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("", "the conditions of this run (hardware, date, seeds)"),
        ("verdict", "the size of the teacher or of the student"),
        ("waterfall", "KL hop by hop"),
        ("pareto", "step time and KL of the same variant"),
        ("pareto", "step time of the teacher"),
        ("losses", "loss curves"),
        ("layers", "layer ranking"),
        ("data", "accepted and rejected completions"),
        ("data", "pass rates"),
        ("tasks", "pass@k and maj@n on tasks"),
        ("prompts", "prompts side by side"),
        ("resources", "time, memory and bytes per stage"),
    ],
)
def test_missing_part_is_named(full: Page, bare: Page, section: str, what: str) -> None:
    assert f"Not measured: {what}." in bare.section(section)
    assert f"Not measured: {what}." not in full.section(section)


def test_variant_without_numbers_says_so_in_every_row(bare: Page) -> None:
    assert bare.tables["gates"][1] == ["fp32", "not measured", "✗ not judged"]
    rows = bare.tables["numbers"][1:]
    assert len(rows) == 14
    assert all(row[1:] == ["not measured"] for row in rows)


def test_missing_parts_of_a_section_are_named(full: Page) -> None:
    assert "Not measured: KL(teacher ‖ bf16)." in full.section("waterfall")
    assert "Not measured: learning rate of on-policy." in full.section("losses")
    assert "samples in on-policy." in full.section("losses")
    assert "of soft KD" not in full.section("losses")
    assert "Not measured: KL token by token." in full.section("prompts")


@pytest.mark.parametrize(
    "row",
    [
        ModelRow("odd", step_s=0.01),
        ModelRow("odd", kl_to_teacher=Estimate(0.3)),
        ModelRow("odd", step_s=0.01, kl_to_teacher=Estimate(math.nan)),
        ModelRow("odd", step_s=math.inf, kl_to_teacher=Estimate(0.3)),
    ],
)
def test_variant_that_cannot_be_drawn_is_named(row: ModelRow) -> None:
    section = Page(render_report(replace(variants=(INT8, row)))).section("pareto")
    assert "Not measured: step time or KL of odd." in section


@pytest.mark.parametrize("phase", [PhaseCurves("KD", (1,), ()), PhaseCurves("KD", (), ())])
def test_phase_without_loss_terms_is_named(phase: PhaseCurves) -> None:
    section = Page(render_report(replace(phases=(phase,)))).section("losses")
    assert "Not measured: loss curves of KD." in section


# --- verdict


def test_verdict_compares_teacher_student_and_default(full: Page) -> None:
    text = full.section("verdict").replace(NBSP, " ")
    assert "teacher-135M (134.5 million parameters, 30 layers)" in text
    assert "student-24 (113.3 million parameters, 24 layers): 1.188× compression" in text
    assert "Served by default: int8, 142.3 MB." in text
    assert "KL(teacher ‖ int8) is 0.3127 [0.291, 0.342] nats per token" in text
    assert "2.5× the decode speed of torch, 3.5× the decode speed of transformers." in text


def test_verdict_names_what_the_default_lacks_and_when_there_is_none(bare: Page) -> None:
    assert "No variant is served by default." in bare.section("verdict")
    row = ModelRow("int8", is_default=True)
    text = Page(render_report(replace(variants=(row,)))).section("verdict")
    assert "Served by default: int8, size not measured." in text
    assert "KL(teacher ‖ int8): not measured." in text
    assert "Speed ratio to the teacher: not measured." in text


def test_gates_table_has_every_gate_with_its_verdict(full: Page) -> None:
    unit = "nats per token"
    assert full.tables["gates"][1:] == [
        ["fp32", "kl_to_teacher", "0.3113", "0.4", unit, "✓ passed"],
        ["fp32", "parity_with_torch", "1.2e-09", "1e-06", unit, "✓ passed"],
        ["int8", "kl_to_teacher", "0.3127", "0.4", unit, "✓ passed"],
        ["int8", "kl_to_float_student", "0.0021", "0.02", unit, "✓ passed"],
        ["int4", "kl_to_teacher", "0.9", "0.4", unit, "✗ FAILED"],
        ["int4", "kl_to_float_student", "not finite", "0.02", unit, "✗ FAILED"],
    ]


def test_variant_without_gates_has_not_passed() -> None:
    assert INT8.is_passed
    assert not INT4.is_passed
    assert not ModelRow("unjudged").is_passed


# --- the other sections


def test_hops_table_has_totals_and_changes(full: Page) -> None:
    assert full.tables["hops"][1:] == [
        ["teacher", "–", "0", "–"],
        ["pruned", "teacher", "1.052", "+1.052"],
        ["after phase 1", "pruned", "0.3113", "-0.7407"],
        ["ONNX fp32", "after phase 1", "0.3113", "+0"],
        ["int8", "ONNX fp32", "0.3127", "+0.0014"],
        ["int4", "ONNX fp32", "0.9", "+0.5887"],
    ]
    assert "KL is not additive" in full.section("waterfall")


def test_plots_stand_in_their_sections(full: Page) -> None:
    assert {"torch", "transformers", "int8 (default)", "int4 (failed a gate)"} <= set(
        full.texts["pareto"]
    )
    assert "after phase 1" in full.texts["waterfall"]
    assert {"forward KL", "reverse KL", "learning rate", "repeated share"} <= set(
        full.texts["losses"]
    )
    assert {"12", "17", "0.081", "0.19"} <= set(full.texts["layers"])
    assert "teacher's pass rate, %" in full.texts["data"]
    assert sum(tag == "svg" for tag, _ in full.tags) == 6


def test_training_shows_first_and_last_value_of_each_term(full: Page) -> None:
    rows = full.tables["table"]
    assert ["forward KL", "nats per token", "1.5", "0.75"] in rows
    assert ["reverse KL", "nats per token", "0.5", "0.25"] in rows


def test_accepted_table_has_counts_and_shares(full: Page) -> None:
    assert full.tables["accepted"][1:] == [
        ["accepted", "60", "60.0%"],
        ["rejected: wrong_answer", "30", "30.0%"],
        ["rejected: truncated", "10", "10.0%"],
        ["all", "100", ""],
    ]


def test_no_completions_have_no_shares() -> None:
    page = Page(render_report(replace(accept_counts=AcceptCounts(0, (("truncated", 0),)))))
    assert page.tables["accepted"][1:3] == [
        ["accepted", "0", "–"],
        ["rejected: truncated", "0", "–"],
    ]


def test_scores_table_has_intervals(full: Page) -> None:
    assert full.tables["scores"] == [
        ["family", "model", "prompts", "pass@1", "pass@4", "maj@8"],
        ["sums", "teacher", "32", "41.0% [33.0%, 49.0%]", "70.0% [60.0%, 80.0%]", "not measured"],
        ["sums", "int8", "32", "40.0%", "60.0%", "45.0% [40.0%, 50.0%]"],
    ]


def test_numbers_table_has_every_number_of_a_variant(full: Page) -> None:
    header, *rows = full.tables["numbers"]
    assert header == ["", "torch", "transformers", "fp32", "int8", "int4"]
    assert {row[0]: row[4] for row in rows} == {
        "size on disk": "142.3 MB",
        "KL(teacher ‖ ·), nats per token": "0.3127 [0.291, 0.342]",
        "its 99th percentile over tokens": "2.8",
        "KL(float student ‖ ·), nats per token": "0.0021",
        "top-1 agreement, teacher": "75.8%",
        "top-1 agreement, float student": "99.4%",
        "flips against the float student": "21 of 5321 (0.4%)",
        "margin at flips: median / p90 / max": "0.12 / 0.61 / 2.4",
        "perplexity of held-out text": "12.33",
        "prefill of one prompt": "30 ms",
        "decode step of one sequence": "10 ms",
        "decode speed of one sequence, tokens/s": "100",
        "peak memory": "256.2 MB",
        "gates": "✓ passed",
    }
    assert rows[-1] == ["gates", "–", "–", "✓ passed", "✓ passed", "✗ FAILED"]


def test_no_flips_have_no_margins() -> None:
    row = ModelRow("int8", flips=Flips(0, 100, None, None, None))
    rows = Page(render_report(replace(variants=(row,)))).tables["numbers"]
    assert ["flips against the float student", "0 of 100 (0.0%)"] in rows
    assert ["margin at flips: median / p90 / max", "no flips"] in rows


def test_worst_prompt_comes_first_with_its_texts(full: Page) -> None:
    text = full.section("prompts")
    assert text.index("Prompt 1: KL 2.5 nats per token") < text.index("Prompt 2: KL 1.25")
    for expected in ("What is 2+2?", "It is 4.", "It is 5.", "Hello", "Hi there"):
        assert expected in text


def test_tokens_are_tinted_by_their_kl(full: Page) -> None:
    spans = [a for tag, a in full.tags if tag == "span"]
    assert [(a["style"], a["title"]) for a in spans] == [
        ("--share: 0.00", "0"),
        ("--share: 0.75", "3"),
    ]


def test_only_the_worst_prompts_are_shown_and_those_without_a_number_first() -> None:
    kls = [*range(MAX_PROMPTS), math.nan]
    comparisons = tuple(PromptComparison(f"prompt-{kl}-", "t", "s", float(kl)) for kl in kls)
    text = Page(render_report(replace(comparisons=comparisons))).section("prompts")
    assert text.count("Prompt ") == MAX_PROMPTS
    shown = [f"prompt-{kl}-" for kl in (math.nan, *range(MAX_PROMPTS - 1, 0, -1))]
    assert re.findall(r"prompt-\w+-", text) == shown


def test_stages_table_has_time_memory_and_bytes(full: Page) -> None:
    assert full.tables["stages"][1:] == [
        ["sample", "30 min 34 s", "1.9 GB", "3.1 MB"],
        ["evaluate", "45.2 s", "not measured", "not measured"],
    ]
