from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bundle.manifest import TeacherReference
from export.inputs import RunInputs
from export.pipeline import Pipeline, open_pipeline
from export.run.files import read_json, write_json
from export.run.settings import ExportConfig
from export.student.phases import HELD_OUT_NAME
from export.student.prune import read_removals
from export.teacher.accept import read_examples
from export.teacher.model_files import TOKENIZER_FILES
from export.teacher.source import TeacherFolder
from tests.support.recipes import ACCEPT_ALL, RecordingReporter

TEACHER = TeacherFolder(
    Path("unused"),
    TeacherReference(
        source="unused",
        weights_sha256="0" * 64,
        architecture="LlamaForCausalLM",
        num_parameters=1,
        dtype="F32",
    ),
)
INT8, INT4 = {"bits": 8, "block_size": 32}, {"bits": 4, "block_size": 32}
RECIPE: dict[str, Any] = {
    "teacher": "unused",
    "output_dir": "runs/x",
    "tasks": {"max_train": 16, "max_test": 4},
    "prune": {"num_texts": 4},
    "cache": {"kind": "dense"},
    "distill": {"phases": [{}, {"teacher_logits": "cache"}]},
    "variants": {"int8": INT8, "int4": INT4 | {"train": {}}},
}
SPECS = [
    "sample",
    "accept",
    "cache",
    "prune",
    "distill",
    "onnx-fp32",
    "onnx-int8",
    "grid-int4",
    "onnx-int4",
    "evaluate",
]


def change(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `recipe` in which the option at the dotted `path` is `value`."""
    changed = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    section: Any = changed
    for name in parents:
        section = section[int(name)] if name.isdigit() else section.setdefault(name, {})
    section[last] = value
    return changed


def describe(recipe: dict[str, Any], teacher: TeacherFolder = TEACHER) -> Pipeline:
    return Pipeline(RunInputs(ExportConfig.model_validate(recipe), teacher), RecordingReporter())


def keys(pipeline: Pipeline) -> dict[str, str]:
    return {spec.name: spec.key for spec in pipeline.specs}


# --- the graph of stages


@pytest.fixture(scope="module")
def original() -> dict[str, str]:
    return keys(describe(RECIPE))


def test_stages_are_listed_behind_what_they_need() -> None:
    pipeline = describe(RECIPE)
    assert [spec.name for spec in pipeline.specs] == SPECS
    seen: set[str] = set()
    for spec in pipeline.specs:
        assert {before.name for before in spec.after} <= seen
        seen.add(spec.name)


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"cache.kind": "none", "distill.phases": [{}]}, ["cache"]),
        ({"variants.int4": INT4}, ["grid-int4"]),
        ({"variants": {}}, ["onnx-int8", "grid-int4", "onnx-int4"]),
    ],
)
def test_what_the_recipe_leaves_out_is_no_stage(
    changes: dict[str, Any], without: list[str]
) -> None:
    recipe = RECIPE
    for path, value in changes.items():
        recipe = change(recipe, path, value)
    names = [spec.name for spec in describe(recipe).specs]
    assert names == [name for name in SPECS if name not in without]


def test_graphs_are_those_of_all_variants_the_float_one_first() -> None:
    assert {name: spec.name for name, spec in describe(RECIPE).graphs.items()} == {
        "fp32": "onnx-fp32",
        "int8": "onnx-int8",
        "int4": "onnx-int4",
    }


FROM_ACCEPT = set(SPECS[1:])
FROM_DISTILL = set(SPECS[4:])
FROM_ONNX = set(SPECS[5:])


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("tasks.max_test", 5, set(SPECS)),
        ("tasks.seed", 1, set(SPECS)),
        ("sample.max_tokens", 17, set(SPECS)),
        ("sample.seed", 1, set(SPECS)),
        ("accept.max_per_prompt", 3, FROM_ACCEPT),
        ("cache.seed", 1, {"cache"} | FROM_DISTILL),
        ("prune.num_removed_layers", 2, {"prune"} | FROM_DISTILL),
        ("distill.phases.1.learning_rate", 1e-5, FROM_DISTILL),
        ("distill.freeze_shared_layers", True, FROM_DISTILL),
        ("onnx.max_model_len", 512, FROM_ONNX),
        ("variants.int8.block_size", 64, {"onnx-int8", "evaluate"}),
        ("variants.int4.block_size", 64, {"grid-int4", "onnx-int4", "evaluate"}),
        ("variants.int4.train.alpha", 0.7, {"grid-int4", "onnx-int4", "evaluate"}),
        # What the kernel computes with is written into the graph, not trained.
        ("variants.int4.accuracy_level", 1, {"onnx-int4", "evaluate"}),
        ("evaluate.seed", 1, {"evaluate"}),
        ("distill.checkpoint_every_s", 1.0, set()),
        ("gates.student_kl", 1.0, set()),
        ("select.rule", "knee", set()),
        ("output_dir", "runs/y", set()),
        ("cache_dir", "runs/z", set()),
    ],
)
def test_changed_option_changes_the_stages_that_follow_from_it_alone(
    original: dict[str, str], path: str, value: Any, changed: set[str]
) -> None:
    now = keys(describe(change(RECIPE, path, value)))
    assert {name for name, key in now.items() if key != original[name]} == changed


def test_added_variant_changes_the_evaluation_alone(original: dict[str, str]) -> None:
    now = keys(describe(change(RECIPE, "variants.more", INT8)))
    assert now.keys() - original.keys() == {"onnx-more"}
    assert {name for name, key in original.items() if now[name] != key} == {"evaluate"}


def test_other_teacher_changes_everything(original: dict[str, str]) -> None:
    reference = TEACHER.reference.model_copy(update={"weights_sha256": "1" * 64})
    now = keys(describe(RECIPE, TeacherFolder(TEACHER.path, reference)))
    assert not set(now.values()) & set(original.values())


def test_file_of_the_teacher_that_shapes_ids_changes_everything(original: dict[str, str]) -> None:
    files = {"chat_template.jinja": "1" * 64}
    now = keys(describe(RECIPE, TeacherFolder(TEACHER.path, TEACHER.reference, files)))
    assert not set(now.values()) & set(original.values())


def test_cache_that_no_phase_reads_does_not_concern_the_student() -> None:
    recipe = change(RECIPE, "distill.phases", [{}])
    first, other = keys(describe(recipe)), keys(describe(change(recipe, "cache.seed", 1)))
    assert {name for name, key in other.items() if first[name] != key} == {"cache"}


@pytest.mark.parametrize(("data", "is_read"), [("teacher", False), ("student", True)])
def test_sampling_is_a_setting_of_training_where_the_student_samples(
    data: str, is_read: bool
) -> None:
    recipe = change(RECIPE, "distill.phases", [{"data": data}])
    first = describe(recipe).distilled
    other = describe(change(recipe, "sample.max_tokens", 17)).distilled
    assert (first.settings != other.settings) is is_read


def test_stage_of_a_variant_knows_that_variant_alone() -> None:
    with pytest.raises(AssertionError, match="int8"):
        describe(RECIPE).trained("int8")


# --- run on the tiny teacher


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for the tests below: what they share is built once."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def open_run(tiny_teacher: Path, run_folder: Path) -> Callable[..., Pipeline]:
    def open_run(phase: dict[str, Any], **sections: Any) -> Pipeline:
        settings = {
            "teacher": str(tiny_teacher),
            "output_dir": str(run_folder),
            "cache_dir": str(run_folder / "teachers"),
            "tasks": {"max_train": 24, "max_test": 4},
            "sample": {"max_tokens": 12, "max_num_seqs": 32, "max_model_len": 256},
            "accept": ACCEPT_ALL,
            "prune": {"num_removed_layers": 1, "num_texts": 2, "num_candidates": 1},
            "distill": {"phases": [{"tokens_per_step": 64, "learning_rate": 1e-3} | phase]},
        }
        return open_pipeline(ExportConfig.model_validate(settings | sections), RecordingReporter())

    return open_run


def held_out_kls(pipeline: Pipeline) -> list[float]:
    """Train and return KL(teacher ‖ student) before and after, in nats per token."""
    folder = pipeline.run(pipeline.distilled).path
    values: list[float] = read_json(folder / HELD_OUT_NAME)
    return values


def test_examples_are_the_accepted_completions_of_a_split(
    open_run: Callable[..., Pipeline],
) -> None:
    pipeline = open_run({})
    summary = pipeline.run(pipeline.accepted).record.summary
    train, test = (read_examples(pipeline.artifacts.accepted, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (summary["accepted"], summary["held_out"])
    assert 12 < len(train) <= 24 and len(test) == 4
    assert not set(train) & set(test)
    assert all(1 <= len(example.completion_token_ids) <= 12 for example in (*train, *test))


def test_student_trained_from_a_cache_is_as_close_as_one_trained_live(
    open_run: Callable[..., Pipeline],
) -> None:
    """All but the 256 likeliest tokens of 512 are in one bucket."""
    cache = {"kind": "top_k", "top_k": 256}
    phase = {"alpha": 1.0, "temperature": 1.0, "num_epochs": 3}
    before, live = held_out_kls(open_run(phase))
    _, from_cache = held_out_kls(open_run(phase | {"teacher_logits": "cache"}, cache=cache))
    assert live < 0.9 * before
    assert from_cache == pytest.approx(live, rel=0.05)


def save_student(folder: Path, teacher: Path, hidden_size: int) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(teacher / name, folder)
    return folder


def test_pretrained_student_takes_the_place_of_pruning(
    open_run: Callable[..., Pipeline], tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = save_student(tmp_path / "small", tiny_teacher, 32)
    pipeline = open_run({"num_epochs": 3}, student=str(folder))
    names = [spec.name for spec in pipeline.specs]
    assert names[:4] == ["sample", "accept", "student", "distill"]
    before, after = held_out_kls(pipeline)
    assert 0 < after < before
    assert read_removals(pipeline.artifacts.untrained) == []
    assert pipeline.run(pipeline.untrained).record.summary["layers"] == 2


def test_pretrained_student_is_known_by_its_weights_wherever_it_lies(
    open_run: Callable[..., Pipeline], tiny_teacher: Path, tmp_path: Path
) -> None:
    first = save_student(tmp_path / "first", tiny_teacher, 32)
    moved = shutil.copytree(first, tmp_path / "moved")
    other = save_student(tmp_path / "other", tiny_teacher, 16)
    found = [open_run({}, student=str(path)).untrained.key for path in (first, moved, other)]
    assert found[0] == found[1] != found[2]


def test_pretrained_student_is_another_one_with_another_configuration(
    open_run: Callable[..., Pipeline], tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = save_student(tmp_path / "small", tiny_teacher, 32)
    before = open_run({}, student=str(folder)).untrained.key
    raw = read_json(folder / "config.json")
    write_json(folder / "config.json", raw | {"rope_theta": 5e5})
    (folder / "README.md").touch()
    assert open_run({}, student=str(folder)).untrained.key != before


def test_student_far_smaller_than_its_teacher_is_warned_about(
    open_run: Callable[..., Pipeline], tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = save_student(tmp_path / "tiny", tiny_teacher, 8)
    pipeline = open_run({}, student=str(folder))
    pipeline.run(pipeline.untrained)
    assert isinstance(pipeline.reporter, RecordingReporter)
    warnings = [line for line in pipeline.reporter.said if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "times fewer parameters than the teacher" in warnings[0]


def test_bfloat16_graph_is_not_measured_where_no_kernel_runs_it() -> None:
    variants = {"half": {"method": "float16"}, "bf16": {"method": "bfloat16"}, "int8": INT8}
    pipeline = describe(change(RECIPE, "variants", variants))
    assert pipeline.artifacts.measured_graphs.keys() == {"fp32", "half", "int8"}
    assert pipeline.graphs.keys() == {"fp32", "half", "bf16", "int8"}
