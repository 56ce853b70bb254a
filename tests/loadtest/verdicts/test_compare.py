"""Two runs side by side, from their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bundle.errors import UserError
from loadtest.analysis.analysis import summarize
from loadtest.analysis.summary import SUMMARY_FILE, read_summary
from loadtest.analysis.summary import to_json as summary_to_json
from loadtest.client.requests_file import REQUESTS_FILE, write_requests
from loadtest.config import RunConfig
from loadtest.records import Phase, RequestRecord, SampleRecord
from loadtest.verdicts.compare import NotComparableError, compare_runs, to_json, to_text
from tests.support.load_tests import planned, recorded


def record(
    number: int, ttft_s: float, is_correct: bool, phase: Phase = Phase.MEASURED
) -> RequestRecord:
    due_s = float(number)
    plan = planned(number, prompt_id=f"p{number}", phase=phase, intended_s=due_s)
    times_s = [number + ttft_s, number + ttft_s + 0.1]
    sample = SampleRecord(0, "STOP", [1, 2], times_s, "", str(is_correct), is_correct)
    return recorded(plan, sent_s=due_s, ended_s=times_s[-1], samples=[sample])


def run_folder(
    folder: Path, *, ttft_s: float = 0.2, num_correct: int = 20, sha256: str = "5e",
    status: str = "OK", problems: Sequence[str] = (), **settings: object,
) -> Path:  # fmt: skip
    """Write what a run of 40 requests behind a warm-up of one writes; first tokens get later."""
    config = RunConfig.model_validate({"out": folder, "arms": ("student",), **settings})
    records = [record(i, ttft_s * (1 + i / 40), i < num_correct) for i in range(40)]
    records[-1].status = status
    records.append(record(40, 9.0, True, Phase.WARMUP))
    summary = summarize(config, sha256, records, [], versions={}, models=[], problems=problems)
    folder.mkdir()
    (folder / SUMMARY_FILE).write_text(summary_to_json(summary))
    write_requests(folder / REQUESTS_FILE, records)
    return folder


def test_runs_of_one_schedule_are_compared_request_by_request(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a")
    after = run_folder(tmp_path / "b", ttft_s=0.1, num_correct=30)
    found = compare_runs(before, after)
    (pairs,) = found.pairs
    assert (pairs.arm_a, pairs.arm_b, pairs.num_pairs) == ("student after", "student before", 40)
    assert pairs.ratios["ttft_p50"].value == pytest.approx(2.0)
    assert pairs.differences["pass@1"].value == 0.25
    assert pairs.mcnemar_p == 2 / 2**10
    text = to_text(found)
    assert "* ttft_p50: student after is 2×" in text
    assert json.loads(to_json(found))["pairs"][0]["num_pairs"] == 40


def test_table_has_what_both_runs_measured(tmp_path: Path) -> None:
    found = compare_runs(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", ttft_s=0.1))
    changes = {change.metric: change for change in found.changes}
    assert changes["ttft_p50"].worse_share == pytest.approx(-0.5)
    assert changes["pass@1"].worse_share == 0
    assert changes["failed_share"].worse_share is None and "ttft_p99" not in changes
    rows = to_text(found).splitlines()
    assert any(row.startswith("| student | 1 | ttft_p50 | ") for row in rows)
    assert any(row.endswith("| 50.0% better |") for row in rows)
    assert any("| pass@1 |" in row and row.endswith("|  |") for row in rows)


def test_other_seeds_are_compared_unpaired(tmp_path: Path) -> None:
    after = run_folder(tmp_path / "b", ttft_s=0.3, sha256="5f", seed=1)
    found = compare_runs(run_folder(tmp_path / "a"), after)
    assert found.pairs == () and found.differing == ()
    assert "Not the same requests" in to_text(found)
    assert "50.0% worse" in to_text(found)


def test_other_settings_are_refused_by_name_unless_forced(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a")
    after = run_folder(tmp_path / "b", sha256="5f", max_tokens=8, slo="ttft_p95=1")
    with pytest.raises(NotComparableError, match="max_tokens is 64 and 8; slo is  and ttft_p95=1"):
        compare_runs(before, after)
    found = compare_runs(before, after, is_forced=True)
    assert to_text(found).startswith("differs: max_tokens is 64 and 8\ndiffers: slo")


def test_other_prompts_under_the_same_settings_are_refused(tmp_path: Path) -> None:
    before, after = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", sha256="5f")
    with pytest.raises(NotComparableError, match="the dataset's contents have changed"):
        compare_runs(before, after)


def test_doubtful_runs_are_said_first(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", status="INTERNAL")
    after = run_folder(tmp_path / "b", problems=["it was interrupted"])
    first, second = to_text(compare_runs(before, after)).splitlines()[:2]
    assert first.endswith("a: 1 of 40 requests failed: 1 errors**")
    assert "b is INVALID: it was interrupted" in second


def test_folder_without_a_summary_or_with_a_broken_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json cannot be read: No such file"):
        read_summary(tmp_path)
    (tmp_path / SUMMARY_FILE).write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not what a run writes"):
        read_summary(tmp_path)
