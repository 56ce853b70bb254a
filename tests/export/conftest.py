"""Random models and their graphs, once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from export.graph.quantize import WeightOnly
from tests.support.random_models import PLAIN, Exported, export_model, random_model


@pytest.fixture(scope="session")
def export_once(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path
) -> Callable[[str], Exported]:
    """Export and quantize an architecture, once for all tests."""

    @functools.cache
    def export(architecture: str) -> Exported:
        recipes = {"int8": WeightOnly(8, 32), "int4": WeightOnly(4, 32)}
        folder = tmp_path_factory.mktemp("graphs")
        return export_model(random_model(architecture), tiny_teacher, folder, **recipes)

    return export


@pytest.fixture(scope="session", params=PLAIN)
def exported(request: pytest.FixtureRequest, export_once: Callable[[str], Exported]) -> Exported:
    """The plainest architectures in turn; test_architectures.py has them all."""
    return export_once(request.param)


@pytest.fixture(scope="session")
def exported_llama(export_once: Callable[[str], Exported]) -> Exported:
    return export_once("llama")
