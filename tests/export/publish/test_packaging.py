from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from bundle.manifest import Manifest, load_manifest
from bundle.model_inputs import hash_model_inputs
from bundle.verify import verify_bundle
from export.graph import parity
from export.measure import memory
from export.measure.summary import read_summary
from export.pipeline import Pipeline, open_pipeline
from export.publish.bundle import REPORT_NAME, put_in_place
from export.publish.finished import FinishedRun
from export.publish.report_data import collect_report
from export.publish.select import GateError
from export.run.settings import ExportConfig
from export.student.prune import read_removals
from tests.support.recipes import SMALL, RecordingReporter

SETTINGS: dict[str, Any] = {
    **SMALL,
    "distill": {"phases": [{"tokens_per_step": 32}]},
    "variants": {"int8": {"bits": 8, "block_size": 32}, "bf16": {"method": "bfloat16"}},
    "evaluate": {
        "max_num_seqs": 4,
        "max_task_prompts": 1,
        "num_samples": 2,
        "k": [1, 2],
        "task_max_tokens": 4,
        "num_timed_tokens": 4,
        "num_rounds": 1,
    },
}
NOTHING_PASSES = {"student_kl": 0.0}
ONLY_FP32_PASSES = {"student_kl": 20.0, "quantized_kl": 0.0}


def open_run(teacher: Path, output_dir: Path, **sections: Any) -> Pipeline:
    paths = {"teacher": teacher, "output_dir": output_dir, "cache_dir": output_dir / "teachers"}
    settings = SETTINGS | {key: str(path) for key, path in paths.items()} | sections
    return open_pipeline(ExportConfig.model_validate(settings), RecordingReporter())


@dataclass(frozen=True, slots=True)
class Finished:
    """A run whose bundle is written; tests work on copies."""

    teacher: Path
    output_dir: Path

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.output_dir / "bundle")

    def copy(self, target: Path, **sections: Any) -> Pipeline:
        """Return the pipeline of a copy: every stage is there, `sections` may differ."""
        shutil.copytree(self.output_dir, target, dirs_exist_ok=True)
        return open_run(self.teacher, target, **sections)


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The measurements that take a new interpreter each are made in this one: they have tests of
    their own, and it would be most of the time."""
    output_dir = tmp_path_factory.mktemp("packaging") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.builds.measure_in_fresh_process", parity.measure)
        patch.setattr("export.measure.stage.measure_peak_bytes", memory.run_graph)
        patch.setattr("export.publish.bundle.verify_bundle_deep", verify_bundle)
        # What follows of a variant that cannot be measured must not depend on the machine.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert open_run(tiny_teacher, output_dir).package() == output_dir / "bundle"
        yield Finished(tiny_teacher, output_dir)


def report_text(path: Path) -> str:
    """Return the report without its tags, spaces collapsed."""
    return " ".join(re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8")).split())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a bundle is written


def test_bundle_is_whole_and_its_default_has_passed(finished: Finished) -> None:
    assert verify_bundle(finished.output_dir / "bundle") == finished.manifest
    assert finished.manifest.variants[finished.manifest.default_variant].is_passed
    assert not (finished.output_dir / "bundle.partial").exists()


def test_report_lies_in_the_bundle_and_beside_it(finished: Finished) -> None:
    report = finished.output_dir / REPORT_NAME
    assert report.read_bytes() == (finished.output_dir / "bundle/eval" / REPORT_NAME).read_bytes()
    assert f"Served by default: {finished.manifest.default_variant}" in report_text(report)


def test_student_is_described_by_what_pruning_left(finished: Finished) -> None:
    student = finished.manifest.student
    pipeline = open_run(finished.teacher, finished.output_dir)
    (removed,) = read_removals(pipeline.artifacts.untrained)
    assert student.kept_layers == tuple(layer for layer in range(4) if layer != removed.layer)
    recorded = pipeline.run(pipeline.distilled).record.summary
    assert (student.num_layers, student.num_parameters) == (3, recorded["parameters"])


def test_teacher_is_named_with_its_folder_and_what_its_files_were(finished: Finished) -> None:
    teacher = finished.manifest.teacher
    assert teacher.local_path == str(finished.teacher.resolve())
    assert teacher.inputs == hash_model_inputs(finished.teacher)
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= teacher.inputs.keys()


def test_report_of_a_finished_run_has_every_part(finished: Finished) -> None:
    pipeline = open_run(finished.teacher, finished.output_dir)
    manifest, artifacts = finished.manifest, pipeline.artifacts
    run = FinishedRun(pipeline.config, pipeline.inputs.teacher, artifacts, manifest.lineage)
    summary = read_summary(artifacts.evaluation)
    data = collect_report(run, manifest.variants, summary, default="int8")
    assert [field.name for field in fields(data) if not getattr(data, field.name)] == []


# --- a variant that was not measured


def test_variant_that_cannot_run_here_is_in_the_bundle_as_not_measured(
    finished: Finished,
) -> None:
    variant = finished.manifest.variants["bf16"]
    assert (variant.gates, variant.metrics, variant.is_passed) == ((), {}, False)
    assert "onnx/bf16/model.onnx" in finished.manifest.files
    card = (finished.output_dir / "bundle" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| bf16")]
    assert row.endswith("| not measured |")
    assert "bf16 not measured ✗ not judged" in report_text(finished.output_dir / REPORT_NAME)


@pytest.mark.parametrize("rule", ["fastest", "lowest_kl", "knee"])
def test_variant_that_was_not_measured_is_never_the_default(
    finished: Finished, tmp_path: Path, rule: str
) -> None:
    bundle = finished.copy(tmp_path, select={"rule": rule}).package()
    assert load_manifest(bundle).default_variant in ("fp32", "int8")


# --- a gate fails


def test_run_whose_gates_fail_leaves_a_report_and_no_bundle(
    finished: Finished, tmp_path: Path
) -> None:
    pipeline = finished.copy(tmp_path, gates=NOTHING_PASSES)
    shutil.rmtree(tmp_path / "bundle")
    (tmp_path / REPORT_NAME).unlink()
    with pytest.raises(GateError, match=r"int8: kl_to_teacher .* exceeds 0\.0") as failure:
        pipeline.package()
    assert failure.value.exit_code == 3
    assert "bf16: nothing was measured" in str(failure.value)
    shown = report_text(tmp_path / REPORT_NAME)
    assert "No variant is served by default." in shown and "✗ FAIL" in shown
    assert not list(tmp_path.glob("bundle*"))
    assert isinstance(pipeline.reporter, RecordingReporter)
    assert str(tmp_path / REPORT_NAME) in pipeline.reporter.said[-1]


def test_older_bundle_outlives_a_run_whose_gates_fail(finished: Finished, tmp_path: Path) -> None:
    pipeline = finished.copy(tmp_path, gates=NOTHING_PASSES)
    before = contents(tmp_path / "bundle")
    with pytest.raises(GateError):
        pipeline.package()
    assert contents(tmp_path / "bundle") == before
    assert "No variant is served" in report_text(tmp_path / REPORT_NAME)


def test_report_of_a_failure_goes_when_the_gates_pass_again(
    finished: Finished, tmp_path: Path
) -> None:
    with pytest.raises(GateError):
        finished.copy(tmp_path, gates=NOTHING_PASSES).package()
    pipeline = open_run(finished.teacher, tmp_path)
    bundle = pipeline.package()
    assert (tmp_path / REPORT_NAME).read_bytes() == (bundle / "eval" / REPORT_NAME).read_bytes()
    assert isinstance(pipeline.reporter, RecordingReporter)
    assert "bundle: finished before" in pipeline.reporter.said[-1]


# --- written again


def test_other_verdicts_write_the_bundle_again_from_the_same_stages(
    finished: Finished, tmp_path: Path
) -> None:
    pipeline = finished.copy(tmp_path, gates=ONLY_FP32_PASSES)
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / "left by a kill").write_text("x")
    manifest = verify_bundle(pipeline.package())
    assert manifest.default_variant == "fp32"
    assert not manifest.variants["int8"].is_passed
    assert manifest.lineage == finished.manifest.lineage
    assert sorted(path.name for path in tmp_path.glob("bundle*")) == ["bundle"]
    assert not (tmp_path / "bundle" / "left by a kill").exists()


def test_second_run_finds_the_bundle(finished: Finished, tmp_path: Path) -> None:
    pipeline = finished.copy(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pipeline.package()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_manifest_is_strict_json(finished: Finished) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (finished.output_dir / "bundle" / "manifest.json").read_text()
    json.loads(text, parse_constant=refuse)


def test_old_bundle_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "x").touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "bundle.partial", tmp_path / "bundle")
    assert (tmp_path / "bundle.old" / "x").exists()
    (tmp_path / "bundle.partial").mkdir()
    put_in_place(tmp_path / "bundle.partial", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_older_bundle_left_aside_by_a_kill_is_removed(finished: Finished, tmp_path: Path) -> None:
    pipeline = finished.copy(tmp_path)
    (tmp_path / "bundle.old").mkdir()
    pipeline.package()
    assert not (tmp_path / "bundle.old").exists()
