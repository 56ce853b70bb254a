"""Content-addressed stages: a folder per stage, named by the hash of all that it depends on.

A `StageSpec` says what a stage is before anything runs: its name, settings, version of the code,
and the stages before it. Its key, and so its folder, follow from these alone, which is how `plan`
and `status` know what is finished. A stage builds in `<name>-<key>.partial` and renames it when it
is whole: a kill at any moment loses at most the step in progress, and a stage that can resume
finds its partial folder again.
"""

from __future__ import annotations

import enum
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bundle.hashing import hash_json
from bundle.manifest import StageRecord
from export.run.files import writing_to
from export.run.lock import sole_user
from export.run.processes import World
from export.run.usage import PeakMemory, folder_size_bytes

RECORD_NAME = "stage.json"

Build = Callable[[Path], dict[str, Any]]
"""Fills the folder it is given and returns a summary for people: small, JSON."""


class RunReporter(Protocol):
    """Where an export tells people how far it is."""

    def say(self, message: str) -> None: ...

    def track(self, label: str) -> Callable[[int, int], None]:
        """Return a function to be called with (done, total)."""
        ...


class QuietReporter:
    """See `RunReporter`: says nothing."""

    def say(self, message: str) -> None:
        pass

    def track(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: None


@dataclass(frozen=True)
class StageSpec:
    """What a stage is. `version` is raised when its code changes what it writes.

    `is_distributed` stages are built by all processes together (`export.run.processes`), others by
    the main one while the rest wait; one that `can_resume` gets its partial folder as it was left.
    The subfolders in `scratch` are needed until the stage is whole, and then removed.
    """

    name: str
    settings: Mapping[str, Any]
    after: tuple[StageSpec, ...]
    build: Build = field(repr=False, compare=False)
    version: int = 1
    can_resume: bool = False
    is_distributed: bool = False
    scratch: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        return hash_json(
            {
                "name": self.name,
                "version": self.version,
                "settings": self.settings,
                "after": [spec.key for spec in self.after],
            }
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: its folder and its record."""

    path: Path
    record: StageRecord


class StageState(enum.Enum):
    """How far a stage is."""

    FINISHED = "finished"
    PARTIAL = "begun"
    MISSING = "to run"


class StageRunner:
    """Runs stages below `root`, or finds them finished there."""

    def __init__(
        self, root: Path, announce: Callable[[str], None], world: World | None = None
    ) -> None:
        self.root = root
        self._announce = announce
        self._world = world or World()
        self._is_sole_user = False

    def path(self, spec: StageSpec) -> Path:
        """Return the folder of a stage, finished or not."""
        return self.root / f"{spec.name}-{spec.key[:12]}"

    def partial_path(self, spec: StageSpec) -> Path:
        """Return the folder in which the stage is being built."""
        return self.root / f"{spec.name}-{spec.key[:12]}.partial"

    def state(self, spec: StageSpec) -> StageState:
        if self.path(spec).exists():
            return StageState.FINISHED
        return StageState.PARTIAL if self.partial_path(spec).exists() else StageState.MISSING

    def find(self, spec: StageSpec) -> Stage | None:
        """Return the stage if it is finished."""
        path = self.path(spec)
        if not path.exists():
            return None
        return Stage(path, StageRecord.model_validate_json((path / RECORD_NAME).read_text()))

    def run(self, spec: StageSpec) -> Stage:
        """Return the stage, building it and what comes before it where that is missing.

        Raises:
            FolderInUseError: another process builds below `root`.
        """
        if self._is_sole_user or not self._world.is_main or self.find(spec) is not None:
            return self._run(spec)
        with writing_to(self.root), sole_user(self.root, self._announce):
            self._is_sole_user = True
            try:
                return self._run(spec)
            finally:
                self._is_sole_user = False

    def _run(self, spec: StageSpec) -> Stage:
        # All processes must agree: a late one would find what the main one has finished by now.
        if self._world.broadcast(self.find(spec) is None):
            for earlier in spec.after:
                self.run(earlier)
            if self._world.is_main or spec.is_distributed:
                with writing_to(self.partial_path(spec)):
                    self._build(spec)
            self._world.wait()
        elif self._world.is_main:  # the process that built it may have been killed before
            self._remove_scratch(spec)
        return self.finished(spec)

    def finished(self, spec: StageSpec) -> Stage:
        """Return a stage that must be there by now; unlike `run`, one process may ask alone."""
        found = self.find(spec)
        assert found is not None, f"{self.path(spec)} is not there: do all processes share it?"
        return found

    def _build(self, spec: StageSpec) -> None:
        self._announce(f"{spec.name} …")
        started_s = time.monotonic()
        memory = PeakMemory()
        partial = self.partial_path(spec)
        if self._world.is_main:
            if not spec.can_resume:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
        if spec.is_distributed:
            self._world.wait()
        summary = spec.build(partial)
        if not self._world.is_main:
            return
        seconds = round(time.monotonic() - started_s, 2)
        record = StageRecord(
            name=spec.name,
            key=spec.key,
            seconds=seconds,
            summary=summary,
            peak_memory_bytes=memory.read_bytes(),
            size_bytes=folder_size_bytes(partial, without=spec.scratch),
        )
        (partial / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n")
        partial.replace(self.path(spec))
        self._remove_scratch(spec)
        self._announce(f"{spec.name}: {seconds:.0f} s, {_shown(record)}")

    def _remove_scratch(self, spec: StageSpec) -> None:
        for name in spec.scratch:
            shutil.rmtree(self.path(spec) / name, ignore_errors=True)


def fresh(folder: Path) -> Path:
    """Empty and return a folder: for builds that do not resume halfway."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def format_summary(record: StageRecord) -> str:
    """Return what a stage says of itself, for people: "steps 153, held out kl 0.2323"."""
    return ", ".join(
        f"{key.replace('_', ' ')} "
        + (f"{value:.4g}" if isinstance(value, float) else json.dumps(value))
        for key, value in record.summary.items()
        if not isinstance(value, dict)
    )


def _shown(record: StageRecord) -> str:
    shown = format_summary(record)
    if record.peak_memory_bytes is None:
        return shown
    memory = f"peak memory {record.peak_memory_bytes / 2**30:.1f} GiB"
    return f"{shown}, {memory}" if shown else memory
