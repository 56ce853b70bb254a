"""Exports that are broken on purpose, for the processes in which R17 and R18 run them."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from export.run import stages
from export.run.stages import StageRunner, StageSpec
from export.student.checkpoint import Checkpoints
from tests.faults.export.export_child import Export, run_export
from tests.faults.export.r17_disk_full import Plan, fill_disk


def fill_disk_unnamed(folder: Path, old: Path, report: Path, plan: Plan) -> None:
    """Pass on what the writers raise, which names no path."""

    def unnamed(folder: Path) -> AbstractContextManager[None]:
        return nullcontext()

    with patch.object(stages, "writing_to", unnamed):
        fill_disk(folder, old, report, plan)


def fill_disk_clearing(folder: Path, old: Path, report: Path, plan: Plan) -> None:
    """Clear the old bundle away before there is a new one."""
    run = StageRunner.run

    def clearing(runner: StageRunner, spec: StageSpec) -> Any:
        shutil.rmtree(runner.root.parent / "bundle", ignore_errors=True)
        return run(runner, spec)

    with patch.object(StageRunner, "run", clearing):
        fill_disk(folder, old, report, plan)


def end_at_once(*arguments: object) -> None:
    """End before there is anything to report."""
    raise SystemExit(1)


def forget_the_optimizer(export: Export) -> None:
    """Go on from a checkpoint with the optimizer as it is at the start."""
    restore = Checkpoints.restore

    def restored(checkpoints: Checkpoints, saved: Any, tensors: Any, optimizer: Any) -> None:
        restore(checkpoints, saved, tensors, optimizer)
        optimizer.state.clear()

    with patch.object(Checkpoints, "restore", restored):
        run_export(export)


def never_finish(export: Export) -> None:
    """Fail where an export was begun before."""
    if (export.output_dir / "work").exists():
        raise SystemExit(1)
    run_export(export)
