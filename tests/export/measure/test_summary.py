from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from export.measure.summary import STUDENT, TEACHER, read_summary, write_summary
from export.run.errors import ExportError
from tests.support.export.measured import make_quality, make_summary

WRITTEN = sorted((Path(__file__).parent / "data").glob("*.json"))
"""As the exports of bundles that are there already wrote them."""


def lay(folder: Path, data: bytes) -> Path:
    (folder / "summary.json").write_bytes(data)
    return folder / "summary.json"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_summary_of_an_older_bundle_is_written_back_byte_for_byte(
    tmp_path: Path, path: Path
) -> None:
    written = lay(tmp_path, path.read_bytes())
    summary = read_summary(tmp_path)
    written.unlink()
    write_summary(tmp_path, summary)
    assert written.read_bytes() == path.read_bytes()


def test_summary_from_before_there_was_a_second_opinion_is_written_back(tmp_path: Path) -> None:
    raw = json.loads(WRITTEN[-1].read_text())
    del raw["tasks"]["second_opinion"]
    written = lay(tmp_path, (json.dumps(raw, indent=2) + "\n").encode())
    before = written.read_bytes()
    write_summary(tmp_path, read_summary(tmp_path))
    assert written.read_bytes() == before


def test_written_summary_is_read_as_it_was(tmp_path: Path) -> None:
    summary = make_summary()
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary


def test_number_that_json_cannot_spell_is_null(tmp_path: Path) -> None:
    quality = {TEACHER: {STUDENT: make_quality(math.nan, forward_kl_ci=None)}}
    summary = replace(make_summary(), quality=quality, perplexity={STUDENT: math.inf})
    write_summary(tmp_path, summary)
    found = read_summary(tmp_path)
    assert found.quality[TEACHER][STUDENT].forward_kl is None
    assert found.perplexity == {STUDENT: None}


def test_model_that_was_not_measured_has_no_quality() -> None:
    assert make_summary().quality_of(TEACHER, "bf16") is None


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, "does not exist: export the bundle again"),
        (b"{", "is not JSON"),
        (b"{}", r"prompts_sha256: Field required: export the bundle again"),
    ],
)
def test_summary_that_cannot_be_read_is_named(
    tmp_path: Path, data: bytes | None, fault: str
) -> None:
    if data is not None:
        lay(tmp_path, data)
    with pytest.raises(ExportError, match=rf"summary\.json.*{fault}"):
        read_summary(tmp_path)
