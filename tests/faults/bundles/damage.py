"""Bundles to damage: copies of an intact one, their manifests, and whether a server takes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from bundle.errors import UserError
from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME, seal
from serve.app.config import ServeConfig
from serve.app.loading import build_engines
from serve.metrics.server_metrics import ServerMetrics

# `torch` reads what `onnx` does not: configuration and weights as transformers finds them.
Backend = Literal["onnx", "torch"]
BACKENDS: tuple[Backend, ...] = ("onnx", "torch")


class Copies:
    """Copies of a bundle in a folder, one at a time; what is beside them is watched by the row."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.folder = folder

    def make(self) -> Path:
        target = self.folder / "bundle"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.source, target)
        return target


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest behind its own validation, and seal it again as if it were meant so."""
    path = bundle / MANIFEST_NAME
    raw = json.loads(path.read_bytes())
    del raw["sha256"]
    change(raw)
    path.write_bytes(seal(json.dumps(raw, indent=2).encode()))


def relist(bundle: Path, *names: str) -> None:
    """Have the manifest list files as they are now, without the checks of an export."""

    def change(raw: dict[str, Any]) -> None:
        for name in names:
            path = bundle / name
            raw["files"].pop(name, None)
            if path.is_file():
                size_bytes = path.stat().st_size
                raw["files"][name] = {"sha256": hash_file(path), "size_bytes": size_bytes}

    edit_manifest(bundle, change)


def why_refused(bundle: Path, backend: Backend = "onnx") -> str | None:
    """Start as `tandem serve` does, up to where it would listen; None where it took the bundle.

    Any error but a UserError is passed on: the command would end with a traceback.
    """
    config = ServeConfig(
        bundle=bundle,
        student_backend=backend,
        no_teacher=True,
        device="cpu",
        max_model_len=64,
        max_num_seqs=2,
        threads=1,
    )
    try:
        build_engines(config, ServerMetrics(CollectorRegistry()))
    except UserError as error:
        return str(error)
    return None
