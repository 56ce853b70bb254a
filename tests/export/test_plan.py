from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM

from bundle.errors import ModelFolderError
from bundle.manifest import StageRecord
from export.estimates import (
    Machine,
)
from export.inputs import RunInputs
from export.pipeline import Pipeline
from export.plan import make_plan, print_plan
from export.run.errors import ExportError
from export.run.model_specs import TeacherError
from export.run.stages import QuietReporter, StageState
from export.status import StageStatus, read_status, render_status
from export.teacher.grading import describe_comparison, math_verify_version
from export.teacher.source import resolve_teacher
from tests.support.recipes import make_config

MACHINE = Machine(matmul_flops_per_s=1e9)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is in Hugging Face's cache, and its servers are out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def shown(plan: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        print_plan(plan, console)
    return capture.get()


# --- what is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prune": {"num_removed_layers": 3, "num_texts": 2}}, r"num_removed_layers 3 is more"),
        ({"cache": {"kind": "top_k", "top_k": 512}}, r"cache\.top_k 512 is not less than the 512"),
        ({"teacher": "./nowhere"}, r"names no teacher that exists"),
    ],
)
def test_plan_refuses_what_would_fail_later(
    tmp_path: Path, tiny_teacher: Path, sections: dict[str, Any], message: str
) -> None:
    config = make_config(tmp_path, **{"teacher": str(tiny_teacher)} | sections)
    with pytest.raises((ExportError, TeacherError), match=message):
        make_plan(config, MACHINE)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_plan_refuses_fewer_rows_than_tokens(
    tmp_path: Path, tiny_teacher: Path, which: str
) -> None:
    models = {"teacher": str(tiny_teacher), "student": str(tiny_teacher)}
    models[which] = str(shutil.copytree(tiny_teacher, tmp_path / which))
    model = LlamaForCausalLM.from_pretrained(tiny_teacher)
    model.resize_token_embeddings(500)
    model.save_pretrained(tmp_path / which)
    with pytest.raises(ExportError, match=rf"{which}/config.json has vocab_size 500, but the tok"):
        make_plan(make_config(tmp_path, **models), MACHINE)


def test_plan_refuses_an_architecture_that_is_not_supported(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in tiny_teacher.iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())
    raw = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(raw | {"model_type": "gpt_neox"}))
    with pytest.raises(ModelFolderError, match=r"teacher/.*: model type 'gpt_neox' is not supp"):
        make_plan(make_config(tmp_path, teacher), MACHINE)


# --- stages and their states


def test_teacher_that_is_not_here_is_planned_for_by_its_name(tmp_path: Path) -> None:
    plan = make_plan(make_config(tmp_path, "no/model-7B"), MACHINE)
    assert {stage.state for stage, _ in plan.stages} == {StageState.MISSING}
    text = shown(plan)
    assert "teacher: 7,000 M parameters (from its name)" in text
    assert "student: 7,000 M parameters (at most: the teacher's)" in text
    assert not any(tmp_path.iterdir()), "nothing is written"


def test_teacher_of_unknown_size_leaves_times_unknown(tmp_path: Path) -> None:
    plan = make_plan(make_config(tmp_path, "no/model"), MACHINE)
    sample = {stage.name: estimate for stage, estimate in plan.stages}["sample"]
    assert sample.completion_tokens == 10 * 96
    assert sample.seconds is not None
    assert math.isnan(sample.seconds)
    text = shown(plan)
    assert "size unknown" in text
    assert "To run: unknown" in text
    assert describe_comparison(math_verify_version()) in text


def test_student_that_is_not_here_leaves_its_stages_to_run(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    plan = make_plan(make_config(tmp_path, tiny_teacher, student="no/small-1.5B"), MACHINE)
    assert [stage.name for stage, _ in plan.stages][2] == "student"
    assert plan.student.num_parameters == 1.5e9


@pytest.fixture
def pipeline(tmp_path: Path, tiny_teacher: Path) -> Pipeline:
    config = make_config(tmp_path, tiny_teacher)
    teacher = resolve_teacher(config.teacher, config.cache_dir)
    return Pipeline(RunInputs(config, teacher), QuietReporter())


def states(pipeline: Pipeline) -> dict[str, StageStatus]:
    stages = read_status(pipeline.config, pipeline.inputs.teacher)
    return {stage.name: stage for stage in stages}


def test_begun_sampling_says_how_many_rows_are_whole(pipeline: Pipeline) -> None:
    folder = pipeline.stages.partial_path(pipeline.sampled)
    folder.mkdir(parents=True)
    assert states(pipeline)["sample"].progress == "", "it has just begun"
    (folder / "completions.jsonl").write_text('{"a": 1}\n{"b": 2}\n{"cut')
    assert states(pipeline)["sample"].progress == "2 of 10 completions"


def test_begun_training_says_where_its_checkpoint_stands(pipeline: Pipeline) -> None:
    folder = pipeline.stages.partial_path(pipeline.distilled)
    folder.mkdir(parents=True)
    assert states(pipeline)["distill"].progress == ""
    checkpoint = folder / "checkpoints" / "checkpoint-000003"
    checkpoint.mkdir(parents=True)
    place = {"phase": 1, "round": 0, "step": 7, "done": 7}
    (checkpoint / "state.json").write_text(json.dumps({"place": place, "log": {}}))
    stage = states(pipeline)["distill"]
    assert stage.state is StageState.PARTIAL
    assert stage.progress == "checkpoint: phase 1, 7 of its steps done"


def test_finished_stage_shows_what_it_took_in_place_of_an_estimate(pipeline: Pipeline) -> None:
    path = pipeline.stages.path(pipeline.sampled)
    path.mkdir(parents=True)
    record = StageRecord(
        name="sample",
        key=pipeline.sampled.key,
        seconds=754.0,
        peak_memory_bytes=1_500_000_000,
        size_bytes=253_000_000,
        summary={"completions": 10, "held_out_kl": 0.123456, "nested": {}},
    )
    (path / "stage.json").write_text(record.model_dump_json())
    lines = shown(make_plan(pipeline.config, MACHINE)).splitlines()
    shown_words = [line.split() for line in lines if " finished " in line]
    assert ["sample", "finished", "253", "MB", "13", "min"] in shown_words
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(render_status(read_status(pipeline.config, pipeline.inputs.teacher)))
    assert "1.5 GB" in capture.get()
    assert "completions 10, held out kl 0.1235\n" in capture.get().replace(" \n", "\n")
