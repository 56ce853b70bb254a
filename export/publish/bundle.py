"""The bundle's folders and its manifest, from the folders that the stages left.

`student/` opens in transformers, `onnx/<variant>/` in onnxruntime, optimum and onnxruntime-genai.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bundle.errors import BundleError
from bundle.hashing import hash_file
from bundle.manifest import (
    Evaluation,
    Manifest,
    StageRecord,
    StudentInfo,
    TeacherReference,
    Variant,
    write_manifest,
)
from bundle.verify import list_entries, verify_bundle
from export.run.stages import RECORD_NAME


def write_bundle(
    target: Path,
    *,
    student_dir: Path,
    variant_dirs: Mapping[str, Path],
    eval_dir: Path,
    report: Path | None = None,
    teacher: TeacherReference,
    student: StudentInfo,
    lineage: tuple[StageRecord, ...],
    variants: Mapping[str, Variant],
    default_variant: str,
    metrics: Evaluation,
) -> Manifest:
    """Write a bundle into the empty folder `target` and return its manifest."""
    _copy_stage(student_dir, target / "student")
    for name, folder in variant_dirs.items():
        _copy_stage(folder, target / "onnx" / name)
    _copy_stage(eval_dir, target / "eval")
    if report is not None:
        shutil.copy(report, target / "eval")
    card = model_card(teacher, student, variants, default_variant, metrics)
    (target / "README.md").write_text(card, encoding="utf-8")
    manifest = Manifest(
        created_at=datetime.now(UTC),
        tandem_version=version("tandem"),
        files=list_entries(target),
        tokenizer_sha256=hash_file(target / "student" / "tokenizer.json"),
        chat_template_sha256=hash_file(target / "student" / "chat_template.jinja"),
        teacher=teacher,
        student=student,
        lineage=lineage,
        variants=dict(variants),
        default_variant=default_variant,
        metrics=metrics,
    )
    write_manifest(target, manifest)
    return manifest


def is_packaged(
    target: Path,
    lineage: tuple[StageRecord, ...],
    variants: Mapping[str, Variant],
    default_variant: str,
) -> bool:
    """Say whether an intact bundle of just these stages and verdicts lies at `target`."""
    try:
        manifest = verify_bundle(target)
    except BundleError:
        return False
    found = (manifest.lineage, manifest.variants, manifest.default_variant)
    return found == (lineage, dict(variants), default_variant)


def _copy_stage(source: Path, target: Path) -> None:
    """Copy what a stage made, but not what it needed on the way.

    With the modes of new files: the writers of weights leave files that only their owner can read,
    and a server is another user.
    """
    working = (RECORD_NAME, "checkpoints", "on-policy-*")
    ignore = shutil.ignore_patterns(*working)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)


_CARD_METRICS = (
    "kl_to_student",
    "kl_to_teacher",
    "argmax_agreement_with_teacher",
    "decode_tokens_per_s",
)


def model_card(
    teacher: TeacherReference,
    student: StudentInfo,
    variants: Mapping[str, Variant],
    default_variant: str,
    metrics: Evaluation,
) -> str:
    """Return the bundle's README.md: everything in it is in the manifest too."""
    rows = [_card_row(name, v, name == default_variant) for name, v in variants.items()]
    return "\n".join(
        [
            "# A Tandem student",
            "",
            f"Distilled from `{teacher.source}` ({teacher.num_parameters / 1e6:.0f} M parameters) "
            f"into {student.num_layers} layers, {student.num_parameters / 1e6:.0f} M parameters.",
            "",
            f"Measured on the teacher's answers to {metrics.num_prompts} held-out prompts "
            f"(temperature {metrics.temperature:g}); KL in nats per token; speed of one sequence "
            "on the machine that exported.",
            "",
            "| variant | size | KL to float student | KL to teacher | argmax agreement "
            "| tokens/s | gates |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "`manifest.json` holds the hashes, the lineage and all numbers.",
            "",
        ]
    )


def _card_row(name: str, variant: Variant, is_default: bool) -> str:
    shown = {key: variant.metrics.get(key, math.nan) for key in _CARD_METRICS}
    return (
        f"| {name}{' (default)' if is_default else ''} | {variant.size_bytes / 1e6:.0f} MB "
        f"| {shown['kl_to_student']:.4f} | {shown['kl_to_teacher']:.3f} "
        f"| {shown['argmax_agreement_with_teacher']:.3f} | {shown['decode_tokens_per_s']:.0f} "
        f"| {_verdict(variant)} |"
    )


def _verdict(variant: Variant) -> str:
    if not variant.gates:
        return "not measured"
    return "passed" if variant.is_passed else "FAILED"
