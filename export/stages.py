"""Content-addressed stages: a folder per stage, named by the hash of all that it depends on.

A stage builds in `<name>-<key>.partial` and renames it when it is whole, so a kill at any moment
loses at most the stage in progress, and a stage that can resume finds its partial folder again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.hashing import hash_json
from bundle.manifest import StageRecord

RECORD_NAME = "stage.json"

Build = Callable[[Path], dict[str, Any]]
"""Fills the folder it is given and returns a summary for people: small, JSON."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: its folder and its record."""

    path: Path
    record: StageRecord


class StageRunner:
    """Runs stages below `root`, or finds them finished there."""

    def __init__(self, root: Path, announce: Callable[[str], None]) -> None:
        self._root = root
        self._announce = announce

    def run(
        self, name: str, settings: Mapping[str, Any], after: tuple[Stage, ...], build: Build
    ) -> Stage:
        """Return the stage `name` for these settings and predecessors, building it if need be."""
        key = hash_json(
            {"name": name, "settings": settings, "after": [s.record.key for s in after]}
        )
        path = self._root / f"{name}-{key[:12]}"
        if path.exists():
            self._announce(f"{name}: finished before, in {path}")
            record = StageRecord.model_validate_json((path / RECORD_NAME).read_text())
            return Stage(path, record)
        self._announce(f"{name} …")
        started_s = time.monotonic()
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        summary = build(partial)
        seconds = round(time.monotonic() - started_s, 2)
        record = StageRecord(name=name, key=key, seconds=seconds, summary=summary)
        (partial / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n")
        partial.replace(path)
        self._announce(f"{name}: {seconds:.0f} s, {_shown(summary)}")
        return Stage(path, record)


def fresh(folder: Path) -> Path:
    """Empty and return a folder: for builds that do not resume halfway."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _shown(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{key.replace('_', ' ')} {json.dumps(value)}"
        for key, value in summary.items()
    )
