from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from export.graph import parity
from export.measure import memory
from export.measure.stage import PER_PROMPT_NAME, TEXTS_NAME
from export.measure.summary import STUDENT, TEACHER, TORCH, TRANSFORMERS, EvalSummary, read_summary
from export.pipeline import Pipeline, open_pipeline
from export.run.settings import ExportConfig
from export.run.stages import QuietReporter
from export.teacher.accept import read_examples
from serve.text.tokenizer import Tokenizer
from tests.support.recipes import SMALL

MEASURED = {"fp32", "int8"}
NUM_TEST, NUM_TASKS = 5, 2
SETTINGS: dict[str, Any] = {
    **SMALL,
    "tasks": {"max_train": 8, "max_test": NUM_TEST},
    # Two answers to every task: the held-out text takes the first of each.
    "sample": {**SMALL["sample"], "num_verifiable_samples": 2},
    "distill": {"phases": [{"tokens_per_step": 32}]},
    "variants": {"int8": {"bits": 8, "block_size": 32}, "bf16": {"method": "bfloat16"}},
    "evaluate": {
        "max_num_seqs": 4,
        "max_task_prompts": NUM_TASKS,
        "num_samples": 2,
        "k": [1, 2],
        "task_max_tokens": 4,
        "num_timed_tokens": 4,
        "num_rounds": 1,
    },
}


def open_run(teacher: Path, output_dir: Path, **evaluate: Any) -> Pipeline:
    paths = {"teacher": teacher, "output_dir": output_dir, "cache_dir": output_dir / "teachers"}
    sections = {"evaluate": SETTINGS["evaluate"] | evaluate}
    settings = SETTINGS | sections | {key: str(path) for key, path in paths.items()}
    return open_pipeline(ExportConfig.model_validate(settings), QuietReporter())


@pytest.fixture(scope="module")
def evaluated(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A run up to its evaluation; what takes a new interpreter each is measured in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.builds.measure_in_fresh_process", parity.measure)
        patch.setattr("export.measure.stage.measure_peak_bytes", memory.run_graph)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # so bf16 is not measured
        pipeline = open_run(tiny_teacher, tmp_path_factory.mktemp("evaluation"))
        pipeline.run(pipeline.evaluated)
        yield pipeline


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def folder(evaluated: Pipeline) -> Path:
    return evaluated.path(evaluated.evaluated)


@pytest.fixture
def summary(folder: Path) -> EvalSummary:
    return read_summary(folder)


def test_stage_holds_every_model_against_teacher_and_student(summary: EvalSummary) -> None:
    assert (summary.num_prompts, summary.quality.keys()) == (NUM_TEST, {TEACHER, STUDENT})
    assert summary.quality[TEACHER].keys() == MEASURED | {STUDENT}
    assert summary.quality[STUDENT].keys() == MEASURED | {TEACHER}
    found = [quality for of_models in summary.quality.values() for quality in of_models.values()]
    assert {quality.num_tokens for quality in found} == {summary.num_tokens}


def test_stage_finds_the_float_graph_to_be_its_student(summary: EvalSummary) -> None:
    """KL of the same weights through two runtimes; the quantized graph is farther off."""
    fp32, int8 = (summary.quality[STUDENT][name].forward_kl for name in ("fp32", "int8"))
    assert fp32 is not None and int8 is not None and 0 <= fp32 < 1e-6 < int8
    assert summary.perplexity["fp32"] == pytest.approx(summary.perplexity[STUDENT], rel=1e-4)


def test_stage_races_variants_against_the_teacher_in_two_runtimes(summary: EvalSummary) -> None:
    assert summary.speed.keys() == MEASURED | {TORCH, TRANSFORMERS}
    assert all(value > 0 for speed in summary.speed.values() for value in astuple(speed))


def test_stage_measures_a_variant_that_cannot_run_here_nowhere(
    evaluated: Pipeline, summary: EvalSummary
) -> None:
    assert "bf16" in evaluated.graphs and summary.tasks is not None
    assert summary.memory.keys() == MEASURED
    assert summary.perplexity.keys() == MEASURED | {TEACHER, STUDENT}
    assert summary.tasks.models.keys() == MEASURED | {TEACHER, STUDENT}
    assert "bf16" not in {name for of in summary.quality.values() for name in of}


def test_stage_rows_are_of_held_out_prompts_and_then_of_tasks(
    folder: Path, summary: EvalSummary
) -> None:
    rows = read_lines(folder / PER_PROMPT_NAME)
    assert [row["kind"] for row in rows] == ["held_out"] * NUM_TEST + ["task"] * NUM_TASKS
    held_out = rows[:NUM_TEST]
    assert sum(row["num_tokens"] for row in held_out) == summary.num_tokens
    of_prompts = [row["num_tokens"] * row["forward_kl"][TEACHER]["int8"] for row in held_out]
    mean = sum(of_prompts) / summary.num_tokens
    assert mean == pytest.approx(summary.quality[TEACHER]["int8"].forward_kl)


def test_stage_sets_the_students_answer_beside_the_teachers(
    evaluated: Pipeline, folder: Path, tiny_teacher: Path
) -> None:
    texts = read_lines(folder / TEXTS_NAME)
    tokenizer = Tokenizer.load(tiny_teacher)
    tasks = [task for task in evaluated.inputs.loaded.tasks if task.split == "test"]
    assert sorted(row["prompt"] for row in texts) == sorted(task.prompt for task in tasks)
    held_out = read_examples(evaluated.artifacts.accepted, "test")
    answers = [tokenizer.decode(example.completion_token_ids) for example in held_out]
    assert [row["teacher"] for row in texts] == answers
    assert all(isinstance(row["student"], str) for row in texts)
    rows = read_lines(folder / PER_PROMPT_NAME)[:NUM_TEST]
    assert [row["forward_kl"] for row in texts] == [
        row["forward_kl"][TEACHER][STUDENT] for row in rows
    ]


def test_stage_tells_people_how_far_the_student_is(
    evaluated: Pipeline, summary: EvalSummary
) -> None:
    student = summary.quality[TEACHER][STUDENT]
    assert evaluated.run(evaluated.evaluated).record.summary == {
        "student_kl": student.forward_kl,
        "argmax_agreement": student.argmax_agreement,
        "tokens": summary.num_tokens,
    }


@pytest.mark.nightly
def test_stage_without_task_prompts_measures_all_but_task_scores(
    evaluated: Pipeline, summary: EvalSummary, tiny_teacher: Path, tmp_path: Path
) -> None:
    """As before, to the last digit."""
    output_dir = evaluated.config.output_dir
    open_run(tiny_teacher, output_dir, max_task_prompts=0).builds.evaluation(tmp_path)
    again = read_summary(tmp_path)
    assert (again.tasks, again.quality) == (None, summary.quality)
    assert {row["kind"] for row in read_lines(tmp_path / PER_PROMPT_NAME)} == {"held_out"}
