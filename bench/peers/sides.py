"""Who takes part: Tandem's variants and its peers, with their weights and settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import UserError
from bundle.manifest import Manifest

FAMILIES = ("transformers", "ortmodel", "genai", "vllm", "llamacpp")
TANDEM = "tandem"
REFERENCE = "reference"
"""The float32 student: measured for KL only."""

# The longest run: a prompt of 512 tokens and one more; rounded up for engines with pages.
MAX_MODEL_LEN = 640
MAX_NUM_SEQS = 16


@dataclass(frozen=True, slots=True)
class Side:
    """One contender. `module` is what its worker loads, `environment` where that lives (None:
    Tandem's own); `kl_from` names the side whose KL holds for this one, "manifest" the bundle's.
    """

    name: str
    weights: str
    module: str
    options: Mapping[str, Any]
    environment: str | None = None
    variant: str | None = None
    kl_from: str | None = None

    @property
    def family(self) -> str:
        return self.name.split("-")[0]


def make_sides(
    bundle: Path, manifest: Manifest, variants: Sequence[str], peers: Sequence[str], root: Path
) -> list[Side]:
    """Return Tandem's sides and those of the families in `peers`.

    Raises:
        UserError: a variant is not in the bundle, or a family is none of `FAMILIES`.
    """
    if unknown := [name for name in variants if name not in manifest.variants]:
        raise UserError(f"variant {unknown[0]!r} is none of {', '.join(manifest.variants)}")
    if unknown := [name for name in peers if name not in FAMILIES]:
        raise UserError(f"peer {unknown[0]!r} is none of {', '.join(FAMILIES)}")
    common = {
        "num_threads": len(os.sched_getaffinity(0)),
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": MAX_MODEL_LEN,
    }
    onnx = bundle.absolute() / "onnx"
    student = {**common, "path": str(bundle.absolute() / "student")}
    shared = [name for name in variants if name in {manifest.default_variant, "fp32"}]
    sides = [
        *(_tandem_onnx(name, {**common, "path": str(onnx / name)}) for name in variants),
        Side(
            "tandem-torch",
            "student, bf16, float32 head",
            "bench.peers.engines.peer_tandem",
            {**student, "backend": "torch"},
        ),
        _transformers("transformers", "student, bf16", {**student, "dtype": "bfloat16"}),
        *(_same_graph("ortmodel", n, None, {**common, "path": str(onnx / n)}) for n in shared),
        *(_same_graph("genai", n, "genai", {**common, "path": str(onnx / n)}) for n in shared),
        Side(
            "vllm",
            "student, bf16",
            "bench.peers.engines.peer_vllm",
            student,
            "vllm",
            kl_from="transformers",
        ),
        Side(
            "llamacpp",
            "student, Q8_0 (GGUF)",
            "bench.peers.engines.peer_llamacpp",
            {**common, "path": str(gguf_path(manifest, root))},
            "llamacpp",
        ),
    ]
    return [side for side in sides if side.family in (TANDEM, *peers)]


def reference_side(bundle: Path) -> Side:
    options = {
        "path": str(bundle.absolute() / "student"),
        "dtype": "float32",
        "num_threads": len(os.sched_getaffinity(0)),
    }
    return _transformers(REFERENCE, "student, fp32", options)


def gguf_path(manifest: Manifest, root: Path) -> Path:
    """Return where the student's GGUF lies under `root`, named by the weights it is made from."""
    sha256 = manifest.files["student/model.safetensors"].sha256
    return root.absolute() / f"student-{sha256[:12]}-q8_0.gguf"


def _tandem_onnx(variant: str, options: dict[str, Any]) -> Side:
    return Side(
        f"tandem-{variant}",
        f"{variant} graph",
        "bench.peers.engines.peer_tandem",
        {**options, "backend": "onnx"},
        variant=variant,
        kl_from="manifest",
    )


def _transformers(name: str, weights: str, options: dict[str, Any]) -> Side:
    return Side(name, weights, "bench.peers.engines.peer_transformers", options)


def _same_graph(
    family: str, variant: str, environment: str | None, options: dict[str, Any]
) -> Side:
    return Side(
        f"{family}-{variant}",
        f"{variant} graph",
        f"bench.peer_{family}",
        options,
        environment,
        variant=variant,
        kl_from="manifest",
    )
