"""A student is replaced by a damaged one, and the shipped alert reaches a webhook: all real."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.monitoring.processes import missing_tools
from scripts.monitoring.rehearsal import QUIET_S, rehearse
from tests.support.tiny_bundle import damage_bundle, make_tiny_bundle

MISSING = missing_tools()


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.nightly
def test_damaged_student_is_told_of(tmp_path: Path) -> None:
    good = make_tiny_bundle(tmp_path / "tiny")
    went = rehearse(good, damage_bundle(good, tmp_path / "damaged"), tmp_path)
    assert went.quiet_s >= QUIET_S, "the good student was not judged long enough"
    assert went.started_s < went.fired_s <= went.delivered_s, went.describe()
    assert went.alert["labels"]["severity"] == "critical"
    assert went.alert["annotations"]["runbook_url"].endswith("docs/runbook.md#tandemkldrift")
