"""A tiny bundle to serve, with torch on both sides, and processes that end with their tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.proxy_processes import TandemProcess
from bundle.hashing import hash_weights
from bundle.manifest import (
    Evaluation,
    Gate,
    Manifest,
    StudentInfo,
    TeacherReference,
    Variant,
    write_manifest,
)
from bundle.verify import list_entries

SMALL = ("--device", "cpu", "--threads", "1", "--max-model-len", "128")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose student is the teacher with some noise; its ONNX graph is none."""
    folder = tmp_path_factory.mktemp("deploy") / "bundle"
    shutil.copytree(tiny_teacher, folder / "student")
    _add_noise(folder / "student" / "model.safetensors")
    (folder / "onnx" / "int8").mkdir(parents=True)
    (folder / "onnx" / "int8" / "model.onnx").write_text("not a graph")
    write_manifest(folder, _manifest(folder, tiny_teacher))
    return folder


def _add_noise(weights: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, weights, {"format": "pt"})


def _manifest(folder: Path, teacher: Path) -> Manifest:
    weights_sha256 = hash_weights(teacher)
    assert weights_sha256 is not None
    gate = Gate(name="kl", measured=0.0, threshold=1.0, passed=True, unit="nats/token")
    return Manifest(
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        tandem_version="0",
        files=list_entries(folder),
        tokenizer_sha256="0" * 64,
        chat_template_sha256="0" * 64,
        teacher=TeacherReference(
            source="tiny", weights_sha256=weights_sha256, architecture="llama",
            num_parameters=1, dtype="float32",
        ),
        student=StudentInfo(num_parameters=1, num_layers=1, kept_layers=(0,), dtype="float32"),
        lineage=(),
        variants={
            "int8": Variant(
                precision="int8", opset=21, inputs=(), outputs=(), size_bytes=1, num_nodes=1,
                gates=(gate,),
            )
        },
        default_variant="int8",
        metrics=Evaluation(num_prompts=0, num_samples=1, k=(), temperature=0, seed=0, values={}),
    )  # fmt: skip


NewTandem = Callable[..., TandemProcess]


@pytest.fixture(scope="session")
def new_tandem(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewTandem]:
    """`new_tandem("--no-teacher")`: a server of the tiny bundle, begun to start."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:

        def start(*flags: str) -> TandemProcess:
            name = f"server-{len(list(folder.glob('*.log')))}"
            process = TandemProcess(
                name, folder,
                ["--bundle", str(tiny_bundle), "--student-backend", "torch", *SMALL, *flags],
            )  # fmt: skip
            stack.callback(process.kill)
            process.start()
            return process

        yield start
