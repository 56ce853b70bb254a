"""Hostile model folders are refused in one line by every command, and nothing happens meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models.hostile_folders import COMMANDS, KINDS, write_kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each command made of each folder, in one process of its own."""
    folder = tmp_path_factory.mktemp("folders")
    write_kernels(folder / "site")
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.models.hostile_folders", str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_at_least_twenty_kinds_are_tried() -> None:
    assert len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_folder_is_refused_in_one_line_by_every_command(results: Any, kind: str) -> None:
    _, message = KINDS[kind]
    assert set(results[kind]) == set(COMMANDS)
    for command, result in results[kind].items():
        assert result["code"] == 1, (command, result)
        lines = [line for line in result["text"].splitlines() if line.startswith("tandem: ")]
        assert len(lines) == 1 and "Traceback" not in result["text"], (command, result)
        assert lines[0].isprintable(), (command, result)
        assert re.search(message, lines[0]), (command, result)
        assert result["seen"] == [], (command, result)


def test_intact_folder_is_taken(results: Any) -> None:
    assert {command: result["code"] for command, result in results["intact"].items()} == {
        "plan": 0, "doctor": 0, "verify": 0, "doctor bundle": 0,
    }  # fmt: skip


def test_kernels_are_called_by_transformers_and_not_by_us(results: Any) -> None:
    """The second number shows that the stand-in would have told."""
    assert results["control"] == {"calls": 0, "calls of transformers": 1}
    assert results["marks"] == {}
