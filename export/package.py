"""The bundle's folders and its manifest, from the folders that the stages left.

`student/` opens in transformers, `onnx/<variant>/` in onnxruntime, optimum and onnxruntime-genai.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from export.stages import RECORD_NAME

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_bundle(
    target: Path,
    *,
    student_dir: Path,
    variant_dirs: Mapping[str, Path],
    eval_dir: Path,
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
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(RECORD_NAME))


def write_variant_files(student_dir: Path, variant_dir: Path, max_model_len: int) -> None:
    """Put beside a graph what other runtimes want there: configuration and tokenizer."""
    config = json.loads((student_dir / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max_model_len
    _write_json(variant_dir / "config.json", config)
    _write_json(variant_dir / "genai_config.json", genai_config(config))
    shutil.copy(student_dir / "generation_config.json", variant_dir)
    for name in TOKENIZER_FILES:
        shutil.copy(student_dir / name, variant_dir)


def genai_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return onnxruntime-genai's description of a graph, from a transformers configuration."""
    pad_token_id = config.get("pad_token_id")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "model": {
            # It names its architectures as transformers does.
            "type": config.get("model_type", "llama"),
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["eos_token_id"] if pad_token_id is None else pad_token_id,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": config["hidden_size"],
                "head_size": head_dim,
                "num_attention_heads": config["num_attention_heads"],
                "num_key_value_heads": config["num_key_value_heads"],
                "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": config["max_position_embeddings"],
            "past_present_share_buffer": True,
        },
    }


def model_card(
    teacher: TeacherReference,
    student: StudentInfo,
    variants: Mapping[str, Variant],
    default_variant: str,
    metrics: Evaluation,
) -> str:
    """Return the bundle's README.md: everything in it is in the manifest too."""
    rows = [
        f"| {name}{' (default)' if name == default_variant else ''} | {v.size_bytes / 1e6:.0f} MB "
        f"| {v.metrics.get('kl_to_student', math.nan):.4f} "
        f"| {v.metrics.get('kl_to_teacher', math.nan):.3f} "
        f"| {v.metrics['argmax_agreement_with_teacher']:.3f} "
        f"| {v.metrics['decode_tokens_per_s']:.0f} | {'passed' if v.is_passed else 'FAILED'} |"
        for name, v in variants.items()
    ]
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
