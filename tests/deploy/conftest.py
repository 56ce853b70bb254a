"""A tiny bundle to serve, with torch on both sides, and processes that end with their tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bundle.manifest import write_manifest
from scripts.k8s.objects import Rendered
from tests.deploy.rendered import SERVED, render_all
from tests.support.manifests import manifest_of
from tests.support.processes import TandemProcess

SMALL = ("--device", "cpu", "--threads", "1", "--max-model-len", "128")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose student is the teacher with some noise; its ONNX graph is none."""
    folder = tmp_path_factory.mktemp("deploy") / "bundle"
    shutil.copytree(tiny_teacher, folder / "student")
    _add_noise(folder / "student" / "model.safetensors")
    (folder / "onnx" / "int8").mkdir(parents=True)
    (folder / "onnx" / "int8" / "model.onnx").write_text("not a graph")
    write_manifest(folder, manifest_of(folder, tiny_teacher))
    return folder


def _add_noise(weights: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, weights, {"format": "pt"})


@pytest.fixture(scope="session")
def all_rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    return render_all(tmp_path_factory.mktemp("k8s"))


@pytest.fixture(params=SERVED)
def rendered(request: pytest.FixtureRequest, all_rendered: dict[str, Rendered]) -> Rendered:
    """Each kustomization with servers in turn."""
    return all_rendered[request.param]


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
