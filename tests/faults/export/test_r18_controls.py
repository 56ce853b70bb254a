"""R18 fails where what is resumed is not what a run in one go would have been."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.export import broken_export, r18_killed_export
from tests.faults.export.export_child import Export
from tests.faults.export.r18_killed_export import Point
from tests.faults.result import RowResult, Size

BreakKills = Callable[[Callable[[Export], None]], RowResult]


@pytest.fixture
def break_kills(monkeypatch: pytest.MonkeyPatch) -> BreakKills:
    """Have the attempts that are killed and resumed be broken, but not the reference run."""
    in_one_go = r18_killed_export.run_in_one_go

    def break_with(work: Callable[[Export], None]) -> RowResult:
        def then_break(export: Export) -> dict[str, float]:
            seconds = in_one_go(export)
            monkeypatch.setattr(r18_killed_export, "run_export", work)
            return seconds

        monkeypatch.setattr(r18_killed_export, "run_in_one_go", then_break)
        # In the midst of training, with checkpoints there; one may fall between two phases.
        monkeypatch.setattr(
            r18_killed_export,
            "draw_points",
            lambda rng, size, seconds: [
                Point("distill", share * seconds["distill"]) for share in (0.25, 0.3, 0.35)
            ],
        )
        monkeypatch.setattr(r18_killed_export, "NUM_KILLS", {Size.CI: 1})
        return r18_killed_export.run(Size.CI)

    return break_with


def test_optimizer_that_is_forgotten_is_found(break_kills: BreakKills) -> None:
    result = break_kills(broken_export.forget_the_optimizer)
    assert result.num_altered >= 1 and "model.safetensors" in result.problems[0]


def test_export_that_cannot_be_resumed_is_found(break_kills: BreakKills) -> None:
    result = break_kills(broken_export.never_finish)
    assert result.num_lost >= 1 and result.problems[0].startswith("cannot be resumed")


def test_kills_that_come_too_late_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r18_killed_export, "MAX_RUNS", {Size.CI: 0})
    assert r18_killed_export.run(Size.CI).problems == ["only 0 of 2 were in time"]
