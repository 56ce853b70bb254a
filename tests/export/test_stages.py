from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.manifest import StageRecord
from export.stages import RECORD_NAME, Stage, StageRunner, fresh


class Recorder:
    """Two stages, the second behind the first, and what was built of them."""

    def __init__(self, root: Path) -> None:
        self.built: list[str] = []
        self.said: list[str] = []
        self._runner = StageRunner(root, self.said.append)

    def run(self, name: str = "sample", after: tuple[Stage, ...] = (), **settings: Any) -> Stage:
        return self._runner.run(name, settings, after, self._build(name))

    def both(self, **settings: Any) -> list[Stage]:
        """Build "sample" with these settings, and "distill" behind it."""
        sample = self.run("sample", **settings)
        return [sample, self.run("distill", (sample,), epochs=1)]

    def _build(self, name: str) -> Callable[[Path], dict[str, Any]]:
        def build(folder: Path) -> dict[str, Any]:
            self.built.append(name)
            (folder / "result.txt").write_text(name)
            return {"rows": 7, "mean_kl": 0.123456}

        return build


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_finished_stage_is_not_built_again(recorder: Recorder, tmp_path: Path) -> None:
    first = recorder.both(seed=1)
    assert Recorder(tmp_path).both(seed=1) == first
    again = Recorder(tmp_path)
    assert again.both(seed=1) == first
    assert again.built == []
    assert all("finished before" in line for line in again.said)


def test_stage_holds_what_was_built_and_its_record(recorder: Recorder) -> None:
    stage = recorder.run(seed=1)
    assert (stage.path / "result.txt").read_text() == "sample"
    written = StageRecord.model_validate_json((stage.path / RECORD_NAME).read_text())
    assert written == stage.record
    assert stage.record.summary == {"rows": 7, "mean_kl": 0.123456}
    assert stage.record.key.startswith(stage.path.name.removeprefix("sample-"))


def test_changed_setting_runs_the_stage_and_what_follows(recorder: Recorder) -> None:
    before, after = recorder.both(seed=1), recorder.both(seed=2)
    assert recorder.built == ["sample", "distill"] * 2
    assert {s.path for s in before}.isdisjoint(s.path for s in after)


def test_stage_that_does_not_follow_is_left_alone(recorder: Recorder) -> None:
    sample = recorder.run("sample", seed=1)
    for epochs in (1, 2):
        recorder.run("distill", (sample,), epochs=epochs)
        recorder.run("sample", seed=1)
    assert recorder.built == ["sample", "distill", "distill"]


def test_setting_that_is_set_back_finds_the_old_stage(recorder: Recorder) -> None:
    stages = [recorder.run(seed=seed) for seed in (1, 2, 1)]
    assert recorder.built == ["sample", "sample"]
    assert stages[0] == stages[2]


def test_order_of_settings_does_not_matter(recorder: Recorder) -> None:
    assert recorder.run(a=1, b=2) == recorder.run(b=2, a=1)


def test_stages_of_two_names_never_meet(recorder: Recorder) -> None:
    assert recorder.run("onnx-int8").record.key != recorder.run("onnx-int4").record.key


def test_kill_leaves_no_finished_stage_and_its_folder_is_found_again(tmp_path: Path) -> None:
    runner, found = StageRunner(tmp_path, lambda message: None), []

    def build(folder: Path) -> dict[str, Any]:
        found.append(sorted(path.name for path in folder.iterdir()))
        (folder / f"row{len(found)}").touch()
        if len(found) < 3:
            raise KeyboardInterrupt
        return {}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.run("sample", {}, (), build)
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    stage = runner.run("sample", {}, (), build)
    assert found == [[], ["row1"], ["row1", "row2"]]
    assert list(tmp_path.iterdir()) == [stage.path]


def test_summary_that_json_cannot_hold_leaves_no_finished_stage(tmp_path: Path) -> None:
    runner = StageRunner(tmp_path, lambda message: None)
    with pytest.raises(ValueError, match="summary"):
        runner.run("sample", {}, (), lambda folder: {"path": folder})
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]


def test_progress_is_announced_in_words(recorder: Recorder) -> None:
    recorder.run()
    assert recorder.said == ["sample …", "sample: 0 s, rows 7, mean kl 0.1235"]


def test_fresh_empties_a_folder_and_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert fresh(folder) == folder
    (folder / "deep").mkdir()
    (folder / "deep" / "file").touch()
    assert list(fresh(folder).iterdir()) == []
