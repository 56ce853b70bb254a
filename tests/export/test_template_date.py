from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

import export.record
from export.pipeline import Pipeline, open_pipeline
from export.record import record_run
from export.run.settings import ExportConfig
from export.run.stages import QuietReporter


def open_on(day: date, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """Open a run as `tandem export run` does on `day`."""
    monkeypatch.setattr(export.record, "process_date", lambda: day)
    config = ExportConfig(teacher=str(recipe.parent / "teacher"), output_dir=recipe.parent / "run")
    pipeline = open_pipeline(config, QuietReporter())
    record_run(recipe, config, pipeline.inputs.teacher)
    return pipeline


def test_prompts_of_a_run_tell_its_first_day(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    for day in (date(2026, 2, 28), date(2026, 3, 1)):
        pipeline = open_on(day, recipe, monkeypatch)
        assert pipeline.inputs.tokenizer.render_chat([("user", "Hi")]) == "28 Feb 2026"


@pytest.mark.parametrize(
    ("template", "is_told"), [("{{ strftime_now('%d') }}", True), ("a", False)]
)
def test_date_is_an_input_of_the_stages_where_prompts_tell_it(
    tmp_path: Path,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    is_told: bool,
) -> None:
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text(template)
    keys = set()
    for day in (date(2026, 2, 28), date(2026, 3, 1)):
        monkeypatch.setattr(export.record, "process_date", lambda day=day: day)
        config = ExportConfig(teacher=str(teacher), output_dir=tmp_path / "run")
        keys.add(open_pipeline(config, QuietReporter()).sampled.key)
    assert len(keys) == 1 + is_told
