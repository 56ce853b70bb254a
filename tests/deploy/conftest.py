"""Rendered manifests, and servers of a tiny bundle that end with their tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.deploy.objects import Rendered
from tests.deploy.rendered import SERVED, render_all
from tests.support.processes import TandemProcess
from tests.support.tiny_bundle import shared_tiny_bundle

SMALL = ("--device", "cpu", "--threads", "1", "--max-model-len", "128")


@pytest.fixture(scope="session")
def all_rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    return render_all(tmp_path_factory.mktemp("k8s"))


@pytest.fixture(params=SERVED)
def rendered(request: pytest.FixtureRequest, all_rendered: dict[str, Rendered]) -> Rendered:
    """Each kustomization with servers in turn."""
    return all_rendered[request.param]


NewTandem = Callable[..., TandemProcess]


@pytest.fixture(scope="session")
def new_tandem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewTandem]:
    """`new_tandem("--no-teacher")`: a server of the tiny bundle, begun to start."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:

        def start(*flags: str) -> TandemProcess:
            name = f"server-{len(list(folder.glob('*.log')))}"
            bundle = ("--bundle", str(shared_tiny_bundle()), "--student-backend", "torch")
            process = TandemProcess(name, folder, [*bundle, *SMALL, *flags])
            stack.callback(process.kill)
            process.start()
            return process

        yield start
