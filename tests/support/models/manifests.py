"""The manifest of a bundle that was made for a test: true about files and weights, else minimal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from bundle.hashing import hash_file, hash_weights
from bundle.manifest import (
    Evaluation,
    FileEntry,
    Gate,
    Manifest,
    StudentInfo,
    TeacherReference,
    Variant,
)
from bundle.model_folder import open_model_folder
from bundle.model_inputs import hash_model_inputs
from bundle.verify import list_entries


def manifest_of(
    folder: Path,
    teacher: Path,
    *,
    variant: str = "int8",
    is_teacher_local: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Describe what lies in `folder`; `metrics` are of its one variant.

    Whether it names where its teacher lies decides whether a server loads that one by itself.
    """
    weights_sha256 = hash_weights(teacher)
    assert weights_sha256 is not None, f"{teacher} has no weights"
    reference = TeacherReference(
        source="tiny",
        weights_sha256=weights_sha256,
        inputs=hash_model_inputs(teacher),
        local_path=str(teacher) if is_teacher_local else None,
        architecture="llama",
        num_parameters=open_model_folder(teacher, has_tokenizer=False).num_parameters,
        dtype="float32",
    )
    found = {
        "files": list_entries(folder),
        "tokenizer_sha256": _hash(folder / "student" / "tokenizer.json"),
        "chat_template_sha256": _hash(folder / "student" / "chat_template.jinja"),
    }
    return minimal_manifest(reference, variant, metrics).model_copy(update=found)


def minimal_manifest(
    teacher: TeacherReference,
    variant: str = "int8",
    metrics: Mapping[str, float] | None = None,
    size_bytes: int = 1,
) -> Manifest:
    """Return a manifest with one file that need not be there."""
    return Manifest(
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        tandem_version="0",
        files={f"onnx/{variant}/model.onnx": FileEntry(sha256="0" * 64, size_bytes=1)},
        tokenizer_sha256="0" * 64,
        chat_template_sha256="0" * 64,
        teacher=teacher,
        student=StudentInfo(num_parameters=1, num_layers=1, kept_layers=(0,), dtype="float32"),
        lineage=(),
        variants={
            variant: Variant(
                precision=variant,
                opset=21,
                inputs=(),
                outputs=(),
                size_bytes=size_bytes,
                num_nodes=1,
                gates=(Gate(name="kl", measured=0, threshold=1, passed=True, unit="nats/token"),),
                metrics=dict(metrics or {}),
            )
        },
        default_variant=variant,
        metrics=Evaluation(num_prompts=0, num_samples=1, k=(), temperature=0, seed=0, values={}),
    )


def _hash(path: Path) -> str:
    return hash_file(path) if path.exists() else "0" * 64
