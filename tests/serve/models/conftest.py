"""A tiny model and its graphs, once for all tests of backends."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_tiny_graphs`; tests leave the folder as it is."""
    from tests.support.models.tiny_graphs import save_tiny_graphs

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_graphs(folder)
    return folder
