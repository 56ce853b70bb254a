from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.manifest import StageRecord
from export.run.files import DiskError
from export.run.stages import RECORD_NAME, Stage, StageRunner, StageSpec, StageState, fresh


class Recorder:
    """Two stages, the second behind the first, and what was built of them."""

    def __init__(self, root: Path) -> None:
        self.built: list[str] = []
        self.said: list[str] = []
        self.runner = StageRunner(root, self.said.append)

    def spec(
        self, name: str = "sample", after: tuple[StageSpec, ...] = (), **settings: Any
    ) -> StageSpec:
        return StageSpec(name, settings, after, self._build(name))

    def run(self, name: str = "sample", **settings: Any) -> Stage:
        return self.runner.run(self.spec(name, **settings))

    def both(self, *, epochs: int = 1, **settings: Any) -> list[Stage]:
        """Run "distill", which comes after "sample" with these settings; return both."""
        sample = self.spec("sample", **settings)
        distill = self.runner.run(self.spec("distill", (sample,), epochs=epochs))
        return [self.runner.run(sample), distill]

    def _build(self, name: str) -> Callable[[Path], dict[str, Any]]:
        def build(folder: Path) -> dict[str, Any]:
            self.built.append(name)
            (folder / "result.txt").write_text(name)
            return {"rows": 7, "mean_kl": 0.123456, "by_reason": {"long": 1}}

        return build


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_stage_that_is_finished_is_not_built_again(recorder: Recorder, tmp_path: Path) -> None:
    first = recorder.both(seed=1)
    again = Recorder(tmp_path)
    assert again.both(seed=1) == first
    assert (again.built, again.said) == ([], [])


def test_stage_of_changed_settings_runs_with_what_follows_and_nothing_else(
    recorder: Recorder,
) -> None:
    before, after = recorder.both(seed=1), recorder.both(seed=2)
    assert recorder.built == ["sample", "distill"] * 2
    assert {s.path for s in before}.isdisjoint(s.path for s in after)
    recorder.both(seed=2, epochs=2)
    assert recorder.built == ["sample", "distill"] * 2 + ["distill"]


def test_stage_of_a_setting_set_back_is_found_again(recorder: Recorder) -> None:
    stages = [recorder.run(seed=seed) for seed in (1, 2, 1)]
    assert recorder.built == ["sample", "sample"]
    assert stages[0] == stages[2]


@pytest.mark.parametrize("can_resume", [True, False])
def test_stage_that_was_killed_gets_its_partial_folder_if_it_can_resume(
    tmp_path: Path, can_resume: bool
) -> None:
    runner, found = StageRunner(tmp_path, lambda message: None), []

    def build(folder: Path) -> dict[str, Any]:
        found.append(sorted(path.name for path in folder.iterdir()))
        (folder / f"row{len(found)}").touch()
        if len(found) < 3:
            raise KeyboardInterrupt
        return {}

    spec = StageSpec("sample", {}, (), build, can_resume=can_resume)
    assert runner.state(spec) is StageState.MISSING
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.run(spec)
        assert list(tmp_path.iterdir()) == [runner.partial_path(spec)]
        assert runner.state(spec) is StageState.PARTIAL and runner.find(spec) is None
    stage = runner.run(spec)
    assert found == ([[], ["row1"], ["row1", "row2"]] if can_resume else [[], [], []])
    assert list(tmp_path.iterdir()) == [stage.path] == [runner.path(spec)]
    assert runner.state(spec) is StageState.FINISHED


BEFORE = StageSpec("sample", {}, (), lambda folder: {})
DISTILL: dict[str, Any] = {
    "name": "distill", "settings": {"seed": 1, "epochs": 2}, "after": (BEFORE,),
    "build": lambda folder: {},
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"settings": {"seed": 2, "epochs": 2}},
        {"name": "other"},
        {"after": ()},
        {"after": (replace(BEFORE, version=2),)},
    ],
)
def test_stage_key_follows_from_what_the_stage_depends_on(changed: dict[str, Any]) -> None:
    key = StageSpec(**DISTILL).key
    assert StageSpec(**DISTILL | {"settings": {"epochs": 2, "seed": 1}}).key == key
    assert StageSpec(**DISTILL | changed).key != key
    # How it is built, not what: a stage begun by one process may be finished by two.
    assert StageSpec(**DISTILL, can_resume=True, is_distributed=True).key == key


def test_stage_record_is_what_is_on_disk_with_summary_size_and_peak_memory(tmp_path: Path) -> None:
    summary = {"rows": 7, "by_reason": {"long": 1}}

    def build(folder: Path) -> dict[str, Any]:
        (folder / "deep").mkdir()
        (folder / "deep" / "rows").write_bytes(b"x" * 1000)
        np.ones(200_000_000, dtype=np.uint8).sum()
        return summary

    stage = StageRunner(tmp_path, lambda message: None).run(StageSpec("a", {}, (), build))
    written = StageRecord.model_validate_json((stage.path / RECORD_NAME).read_text())
    assert written == stage.record and written.summary == summary
    assert written.key.startswith(stage.path.name.removeprefix("a-"))
    assert written.size_bytes == 1000
    assert written.peak_memory_bytes is not None and written.peak_memory_bytes > 200_000_000


def test_stage_with_a_summary_that_is_no_json_is_not_finished(tmp_path: Path) -> None:
    runner = StageRunner(tmp_path, lambda message: None)
    with pytest.raises(ValueError, match="summary"):
        runner.run(StageSpec("sample", {}, (), lambda folder: {"path": folder}))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]


def test_stage_announces_its_progress_in_words(recorder: Recorder) -> None:
    recorder.run()
    begun, done = recorder.said
    assert begun == "sample …"
    assert done.startswith("sample: 0 s, rows 7, mean kl 0.1235, peak memory ")
    assert done.endswith(" GiB")


def test_fresh_empties_a_folder_and_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert fresh(folder) == folder
    (folder / "deep").mkdir()
    (folder / "deep" / "file").touch()
    assert list(fresh(folder).iterdir()) == []


def test_stage_on_a_full_disk_is_named_and_what_was_finished_is_kept(
    recorder: Recorder, tmp_path: Path
) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    sample = recorder.spec("sample")
    distill = StageSpec("distill", {}, (sample,), fill)
    with pytest.raises(DiskError, match=r"/distill-\w{12}.partial cannot be written: No space"):
        recorder.runner.run(distill)
    assert recorder.runner.state(sample) is StageState.FINISHED


def test_stage_killed_behind_the_rename_loses_its_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "state").write_bytes(b"x" * 1000)
        return {}

    def killed(path: Path, target: Path) -> Path:
        rename(path, target)
        raise KeyboardInterrupt

    rename = Path.replace
    spec = StageSpec("distill", {}, (), build, can_resume=True, scratch=("checkpoints",))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        StageRunner(tmp_path, lambda message: None).run(spec)
    runner = StageRunner(tmp_path, lambda message: None)
    assert (runner.path(spec) / "checkpoints").exists()
    runner.run(spec)
    assert [path.name for path in runner.path(spec).iterdir()] == [RECORD_NAME]
