"""The campaign keeps what has run, goes on from there, and fails where a row did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import campaign
from tests.faults.bundles import r12_no_gpu
from tests.faults.result import RowResult, Size

FAST = "R12"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["campaign", *words])
    return campaign.main()


def test_rows_are_those_of_the_matrix() -> None:
    assert list(campaign.find_rows()) == [f"R{number}" for number in range(1, 23)]


def test_finished_row_is_kept_and_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--only", FAST, "--out", str(out)) == 0
    kept = json.loads(out.read_text())
    assert kept["size"] == "ci" and kept["rows"][FAST]["is_passed"]
    table = capsys.readouterr().out
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert kept["rows"][FAST]["commit"].startswith(head.stdout[:12])
    assert f"commits: {head.stdout[:12]}" in table

    def fail(size: Size) -> RowResult:
        raise AssertionError("it ran already")

    monkeypatch.setattr(r12_no_gpu, "run", fail)
    assert run(monkeypatch, "--only", FAST, "--out", str(out)) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(AssertionError, match="it ran already"):
        run(monkeypatch, "--only", FAST, "--out", str(out), "--again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problems": ["it was slow"]}, "R12: it was slow"),
        ({"num_lost": 1}, "1 failed"),
        ({"leaks": ["a slot"]}, "R12: a slot"),
    ],
)
def test_row_that_failed_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    result = RowResult(FAST, "no GPU", **change)
    monkeypatch.setattr(r12_no_gpu, "run", lambda size: result)
    assert run(monkeypatch, "--only", FAST, "--markdown") == 1
    text = capsys.readouterr().out
    assert words in text and "FAILED" in text and text.lstrip().startswith("| row")


def test_rows_of_another_size_are_not_taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"size": "full", "rows": {}}))
    with pytest.raises(SystemExit, match="has rows of size full; give --again"):
        run(monkeypatch, "--only", FAST, "--out", str(out))


def test_unknown_row_is_refused_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--only", "R1,R23")
    assert "--only R23: the rows are R1, R2," in capsys.readouterr().err
