"""R17 fails where an export does not say which path is full, or gives up the old bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.export import broken_export, r17_disk_full
from tests.faults.export.export_child import DISTILL
from tests.faults.export.r17_disk_full import Plan, Point
from tests.faults.export.small_disk import SmallDisk
from tests.faults.result import RowResult, Size


def run_with(monkeypatch: pytest.MonkeyPatch, fill_disk: object, room_bytes: int = 0) -> RowResult:
    plan = Plan(DISTILL, (Point(DISTILL, room_bytes),))
    monkeypatch.setattr(r17_disk_full, "PLANS", {Size.CI: plan})
    monkeypatch.setattr(r17_disk_full, "fill_disk", fill_disk)
    return r17_disk_full.run(Size.CI)


def test_full_disk_without_its_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = run_with(monkeypatch, broken_export.fill_disk_unnamed).problems
    assert problems and "traceback of " in problems[0]


def test_old_bundle_that_is_given_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with(monkeypatch, broken_export.fill_disk_clearing)
    assert result.num_lost == 1 and "the old bundle is gone" in result.problems[0]


def test_disk_that_is_never_full_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = run_with(monkeypatch, r17_disk_full.fill_disk, 100 << 20).problems
    assert any("it ended well" in problem for problem in problems)


def test_process_that_ends_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = run_with(monkeypatch, broken_export.end_at_once).problems
    assert problems == ["the export's process ended with 1: it left no report"]


def test_disk_needs_a_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.faults.export.small_disk.CLONE_NEWNS", 0x1)  # no flag of unshare
    with pytest.raises(OSError, match="no namespace of mounts"):
        SmallDisk(tmp_path)
