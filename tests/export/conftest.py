"""Random models and their graphs, once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.graph.quantize import WeightOnly
from export.teacher.examples import Example
from tests.support.random_models import (
    PLAIN,
    Exported,
    export_model,
    random_examples,
    random_model,
)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return random_model


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    return random_examples


@pytest.fixture(scope="session")
def export_to(tiny_teacher: Path) -> Callable[..., Exported]:
    """`export_to(folder, model, int8=WeightOnly(8, 128))`: every variant, the tokenizer beside."""

    def export(target: Path, model: Any, **recipes: WeightOnly) -> Exported:
        return export_model(model, tiny_teacher, target, **recipes)

    return export


@pytest.fixture(scope="session")
def export_once(
    tmp_path_factory: pytest.TempPathFactory, export_to: Callable[..., Exported]
) -> Callable[[str], Exported]:
    """Export and quantize an architecture, once for all tests."""

    @functools.cache
    def export(architecture: str) -> Exported:
        recipes = {"int8": WeightOnly(8, 32), "int4": WeightOnly(4, 32)}
        return export_to(tmp_path_factory.mktemp("graphs"), random_model(architecture), **recipes)

    return export


@pytest.fixture(scope="session", params=PLAIN)
def exported(request: pytest.FixtureRequest, export_once: Callable[[str], Exported]) -> Exported:
    """The plainest architectures in turn; test_architectures.py has them all."""
    return export_once(request.param)


@pytest.fixture(scope="session")
def exported_llama(export_once: Callable[[str], Exported]) -> Exported:
    return export_once("llama")
