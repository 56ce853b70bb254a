"""A run that is killed three times ends in the bytes of one that was not.

Real processes and SIGKILL: nothing gets to tidy up.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundle.verify import verify_bundle
from tests.support.recipes import RESUMED, write_recipe

pytestmark = pytest.mark.nightly

# One thread: both runs share the cores, and torch sums in another order with another number.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MAX_WAIT_S = 200


@dataclass(frozen=True, slots=True)
class Run:
    """A recipe with an output folder of its own; `stack` ends what still runs when tests fail."""

    recipe: Path
    output_dir: Path
    stack: ExitStack

    @property
    def bundle(self) -> Path:
        return self.output_dir / "bundle"

    def start(self, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tandem", "export", *map(str, words)]
        with (self.output_dir.parent / "log").open("a") as log:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, text=True)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    @property
    def log(self) -> str:
        return (self.output_dir.parent / "log").read_text()

    def kill_when(self, is_time: Callable[[Path], bool], *words: object) -> None:
        """Start a command and send it SIGKILL when `is_time` of the folder of its stages."""
        process = self.start(*words)
        deadline_s = time.monotonic() + MAX_WAIT_S
        while not is_time(self.output_dir / "work"):
            assert process.poll() is None, self.log
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def make_run(
    tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Run]]:
    stack = ExitStack()

    def make_run(name: str) -> Run:
        folder = tmp_path_factory.mktemp(name)
        run = Run(folder / "recipe.yaml", folder / "run", stack)
        paths = {"output_dir": run.output_dir, "cache_dir": folder / "t"}
        write_recipe(run.recipe, RESUMED, teacher=tiny_teacher, **paths)
        return run

    with stack:
        yield make_run


def stages(work: Path) -> set[str]:
    """Return the finished stages by name."""
    folders = [path for path in work.glob("*-*") if path.suffix != ".partial"]
    return {path.name.rpartition("-")[0] for path in folders}


def is_accepted(work: Path) -> bool:
    return stages(work) >= {"sample", "accept"}


def is_in_the_second_round_of_the_second_phase(work: Path) -> bool:
    return any(work.glob("distill-*.partial/on-policy-1-1.json"))


def is_quantized(work: Path) -> bool:
    return "onnx-int8" in stages(work)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two finished runs of one recipe, and what was there at each kill of the second."""

    whole: Run
    killed: Run
    found: list[set[str]]
    checkpoints: list[str]


@pytest.fixture(scope="module")
def runs(make_run: Callable[[str], Run]) -> Pair:
    whole, killed = make_run("whole"), make_run("killed")
    in_one_go = whole.start("run", whole.recipe)
    found, checkpoints = [], []
    for is_time, words in (
        (is_accepted, ("run", killed.recipe)),
        (is_in_the_second_round_of_the_second_phase, ("resume", killed.output_dir)),
        (is_quantized, ("resume", killed.output_dir)),
    ):
        killed.kill_when(is_time, *words)
        work = killed.output_dir / "work"
        found.append(stages(work))
        checkpoints += [path.name for path in work.glob("distill-*.partial/checkpoints/*-0*")]
    assert killed.start("resume", killed.output_dir).wait(MAX_WAIT_S) == 0, killed.log
    assert in_one_go.wait(MAX_WAIT_S) == 0, whole.log
    return Pair(whole, killed, found, checkpoints)


def hashes(bundle: Path) -> dict[str, str]:
    files = [bundle / "student" / "model.safetensors", *bundle.rglob("model.onnx*")]
    return {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_kills_came_when_they_should(runs: Pair) -> None:
    """Between two stages, in training with a checkpoint written, and before the evaluation."""
    first, second, third = runs.found
    assert {"sample", "accept"} <= first and "distill" not in first
    assert "prune" in second and "distill" not in second
    assert runs.checkpoints, "nothing to go on from"
    assert "onnx-int8" in third and "evaluate" not in third
    assert not (runs.killed.output_dir / "bundle.partial").exists()


def test_student_and_graphs_are_those_of_a_run_in_one_go(runs: Pair) -> None:
    expected = hashes(runs.whole.bundle)
    assert expected.keys() == {
        "student/model.safetensors",
        "onnx/fp32/model.onnx",
        "onnx/fp32/model.onnx.data",
        "onnx/int8/model.onnx",
        "onnx/int8/model.onnx.data",
    }
    assert hashes(runs.killed.bundle) == expected


def test_both_bundles_are_whole_and_have_the_same_lineage(runs: Pair) -> None:
    whole, killed = verify_bundle(runs.whole.bundle), verify_bundle(runs.killed.bundle)
    assert [s.key for s in killed.lineage] == [s.key for s in whole.lineage]


def test_log_of_training_has_every_step_once(runs: Pair) -> None:
    """Also those before the kill, as the checkpoint kept them."""
    logs = [(run.bundle / "student" / "training.jsonl").read_text() for run in (
        runs.whole, runs.killed)]  # fmt: skip
    assert logs[0] == logs[1]
    assert len(set(logs[0].splitlines())) == len(logs[0].splitlines()) > 0


def test_finished_stages_are_found_again(runs: Pair) -> None:
    assert runs.whole.log.count("sample …") == runs.killed.log.count("sample …") == 1
    assert runs.killed.log.count("sample: finished before") == 3
