"""Exports in processes that can be killed: forked from one that has imported everything once.

A small recipe, as in tests/test_resume.py; one thread, since torch sums in another order with
another number of them. The children of a child that is killed are killed with it, as those of a
container are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from export.pipeline import open_pipeline
from export.record import record_run
from export.run.recipe import load_config
from tests.support.models.tiny_teacher import save_tiny_teacher
from tests.support.recipes import RESUMED, write_recipe

DISTILL, BUNDLE = "distill", "bundle"
MAX_EXPORT_S = 300.0

# Everything that an export imports, so that a fork is in the midst of its work at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.export.export_preload"])


@dataclass(frozen=True, slots=True)
class Export:
    """A recipe and where it writes; `until` is the last stage, or the bundle."""

    recipe: Path
    output_dir: Path
    until: str = BUNDLE

    @property
    def log(self) -> Path:
        """What every attempt has said, a line each."""
        return self.recipe.with_suffix(".log")


class LogReporter:
    """Appends what an export says to a file, and passes on which stage begins."""

    def __init__(self, path: Path, on_stage: Callable[[str], None]) -> None:
        self._path = path
        self._on_stage = on_stage

    def say(self, message: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")
        if message.endswith(" …"):
            self._on_stage(message.removesuffix(" …"))

    def track(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: None


def make_export(folder: Path, output_dir: Path, until: str = BUNDLE) -> Export:
    """Write a recipe into `folder`, beside the teacher that it shares with others there."""
    teacher = folder / "teacher"
    if not teacher.exists():
        teacher.mkdir(parents=True)
        save_tiny_teacher(teacher)
    export = Export(folder / f"{output_dir.name}.yaml", output_dir, until)
    paths = {"teacher": teacher, "output_dir": output_dir, "cache_dir": folder / "cache"}
    write_recipe(export.recipe, RESUMED, **paths)
    export.log.touch()
    return export


def run_export(export: Export, on_stage: Callable[[str], None] = lambda stage: None) -> None:
    """Run, or go on with, an export in this process; what it says goes to the log.

    `on_stage` is told the name of a stage before it is built.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that it starts
    config = load_config(export.recipe)
    pipeline = open_pipeline(config, LogReporter(export.log, on_stage))
    record_run(export.recipe, config, pipeline.inputs.teacher)
    if export.until == DISTILL:
        pipeline.run(pipeline.distilled)
    else:
        pipeline.package()


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Run a function of a module in a new process, the leader of its own group."""
    process = _CONTEXT.Process(target=_lead, args=(work, *arguments))
    process.start()
    return process


def _lead(work: Callable[..., None], *arguments: object) -> None:
    os.setsid()
    work(*arguments)


def finish(process: BaseProcess) -> int:
    """Wait for a process; returns its exit code."""
    process.join(MAX_EXPORT_S)
    if process.exitcode is None:
        kill(process)
        raise AssertionError(f"{process} did not end in {MAX_EXPORT_S} s")
    return process.exitcode


def kill(process: BaseProcess) -> None:
    """Send SIGKILL to a process and its children."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has ended, or is not the leader yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def wait_for(process: BaseProcess, is_time: Callable[[], bool]) -> bool:
    """Wait until it is time; False where the process has ended before."""
    until_s = time.monotonic() + MAX_EXPORT_S
    while not is_time():
        if process.exitcode is not None:
            return False
        assert time.monotonic() < until_s, "it was never time"
        time.sleep(0.001)
    return True
