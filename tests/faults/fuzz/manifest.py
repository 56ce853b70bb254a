"""Bytes as a bundle's manifest: an intact bundle, or a BundleError; nothing is read outside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bundle.errors import BundleError, ModelFolderError
from bundle.manifest import MANIFEST_NAME, seal
from bundle.model_config import read_model_config
from bundle.model_weights import find_weights
from bundle.verify import check_safe, verify_bundle
from tests.faults.fuzz.scratch import scratch_folder

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
GRAPH, CONTENT = "onnx/fp32/model.onnx", b"graph"
_SHA256 = hashlib.sha256(CONTENT).hexdigest()


def check(data: bytes) -> None:
    """Write the bytes as the manifest of a folder with one file; raises where that goes wrong.

    As they are, and sealed: what was changed after it was sealed gets no further than that. And
    as the other files of JSON that are looked into.
    """
    for text in (data, seal(data.rstrip().removesuffix(b"}").rstrip() + b"\n}")):
        _check(text)
    folder = scratch_folder("models")
    for name in (CONFIG, INDEX):
        (folder / name).write_bytes(data)
        with suppress(BundleError):
            check_safe(folder, name)
    with suppress(ModelFolderError):
        find_weights(folder)
    with suppress(ModelFolderError):
        read_model_config(folder)


def _check(data: bytes) -> None:
    path = _bundle() / MANIFEST_NAME
    path.write_bytes(data)
    try:
        manifest = verify_bundle(path.parent)
    except BundleError as error:
        assert str(error).isprintable() and str(error).strip(), error
        return
    assert set(manifest.files) == {GRAPH}, sorted(manifest.files)


@cache
def _bundle() -> Path:
    folder = scratch_folder("bundle")
    (folder / GRAPH).parent.mkdir(parents=True)
    (folder / GRAPH).write_bytes(CONTENT)
    return folder


def manifest() -> dict[str, Any]:
    """Return the manifest of that folder."""
    gate = {"name": "kl", "measured": 0.1, "threshold": 1.0, "passed": True, "unit": "nats"}
    return {
        "schema_version": 1,
        "created_at": "2026-11-22T00:00:00Z",
        "tandem_version": "0.1.0",
        "files": {GRAPH: {"sha256": _SHA256, "size_bytes": len(CONTENT)}},
        "tokenizer_sha256": _SHA256,
        "chat_template_sha256": _SHA256,
        "teacher": {"source": "x", "weights_sha256": _SHA256, "architecture": "Llama",
                    "num_parameters": 1, "dtype": "float32"},
        "student": {"num_parameters": 1, "num_layers": 1, "kept_layers": [0], "dtype": "float32"},
        "lineage": [{"name": "distill", "key": "k", "seconds": 1.0, "summary": {"a": [1, None]}}],
        "variants": {"fp32": {"precision": "fp32", "opset": 17, "inputs": [], "outputs": [],
                              "size_bytes": 5, "num_nodes": 1, "gates": [gate]}},
        "default_variant": "fp32",
        "metrics": {"num_prompts": 1, "num_samples": 1, "k": [1], "temperature": 0.0, "seed": 1,
                    "values": {"pass@1": 0.5}},
    }  # fmt: skip


def seeds() -> Iterator[bytes]:
    """Yield the manifest, and some that name what they must not."""
    yield json.dumps(manifest()).encode()
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b", "x" * 300, "x/" * 3000 + "y", "a.pkl"):
        files = {**manifest()["files"], name: {"sha256": _SHA256, "size_bytes": 5}}
        yield json.dumps(manifest() | {"files": files}).encode()
    for changed in (
        {"files": {GRAPH: {"sha256": _SHA256, "size_bytes": 6}}},
        {"files": {GRAPH: {"sha256": "0" * 64, "size_bytes": len(CONTENT)}}},
        {"files": {}}, {"schema_version": 2}, {"default_variant": "int8"}, {"variants": {}},
        {"tokenizer_sha256": "x"}, {"created_at": "now"}, {"metrics": None},
    ):  # fmt: skip
        yield json.dumps(manifest() | changed).encode()
    for name in ("model.safetensors", "..", "a/b", "\x1b[2J"):
        yield json.dumps({"weight_map": {"a": name}, "auto_map\r": 1}).encode()
    yield b'{"auto_map": {}, "weight_map": []}'
    yield b"[" * 4000
    yield b'{"schema_version": ' + b"1" * 4000 + b"}"
