"""Two processes train as one does. Run as a script, this file is one of the two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from transformers import LlamaForCausalLM

from export.run.processes import World
from export.run.stages import StageRunner, StageSpec
from export.run.training import PhaseConfig
from export.student.grid import BlockGrid
from export.student.phases import GridTraining, Text, linear_grids
from export.student.step import Pair
from export.student.trainer import Log, PlainParameters, Trainer, TrainingPhase
from export.teacher.examples import Example

# Micro-batches of one example, two to a step, and a last step of one: rank 1 has nothing to do.
PHASE = PhaseConfig(
    learning_rate=3e-3, tokens_per_step=8, tokens_per_micro_batch=8, num_epochs=2, seed=3
)
EXAMPLES = [Example((i, i + 1, i + 2), (i + 3, i + 4, i + 5, i + 6)) for i in range(1, 82, 16)][:5]


def train(folder: Path, kind: str, world: World) -> Log:
    """Train the student in a folder in float32; every process writes `<kind>-<rank>`."""
    student, teacher = (LlamaForCausalLM.from_pretrained(folder / name) for name in "st")
    if kind == "grid":
        grids = linear_grids(student, lambda name: BlockGrid(8, 16))
        text = Text(EXAMPLES, EXAMPLES, frozenset())
        phase = GridTraining(student, teacher, grids, {}, PHASE, text).phase()
    else:
        parameters = PlainParameters(student=student)
        phase = TrainingPhase(PHASE, Pair(student, teacher), parameters, 2, lambda _: EXAMPLES)
    target = folder / f"{kind}-{world.rank}-of-{world.size}"
    trainer = Trainer(
        folder / f"checkpoints-{kind}-{world.size}",
        checkpoint_every_s=1e-9,
        world=world,
        dtype=torch.float32,
    )
    log = trainer.run([lambda: phase])
    student.save_pretrained(target)
    log.write_steps(target)
    return log


def run_stages(folder: Path, world: World) -> None:
    """Build two fast stages; only the second one is built by both processes."""

    def build(path: Path, wait: Callable[[], None] = world.wait) -> dict[str, Any]:
        (path / f"by-{world.rank}").touch()
        wait()
        return {}

    alone = StageSpec("alone", {}, (), lambda path: build(path, lambda: None))
    together = StageSpec("together", {}, (alone,), build, is_distributed=True)
    stage = StageRunner(folder / "work", lambda message: None, world).run(together)
    assert sorted(path.name for path in stage.path.glob("by-*")) == ["by-0", "by-1"]
    assert world.broadcast({"rank": world.rank}) == {"rank": 0}


def run_as_two(*arguments: str) -> None:
    """Run this file as two processes that find each other as those of `accelerate launch` do."""
    from tests.support.processes import free_port

    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, __file__, *arguments]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    from tests.support.random_models import random_model  # which the two processes need not load

    random_model(num_layers=1, seed=1).save_pretrained(tmp_path / "s")
    random_model(num_layers=1).save_pretrained(tmp_path / "t")
    run_as_two(str(tmp_path))
    for kind in ("plain", "grid"):
        log = train(tmp_path, kind, World())
        first, second = (tmp_path / f"{kind}-{rank}-of-2" for rank in (0, 1))
        alone = load_file(tmp_path / f"{kind}-0-of-1" / "model.safetensors")
        weights, others = (load_file(f / "model.safetensors") for f in (first, second))
        rows = [(f / "training.jsonl").read_text() for f in (first, second)]
        assert rows[0] == rows[1]
        assert len(log.steps) == 6 and log.steps[2].num_tokens == 4
        assert read_steps(rows[0]) == pytest.approx(
            [value for step in log.steps for value in astuple(step)], abs=1e-4
        )
        for name, value in weights.items():
            assert value.equal(others[name]), name
            # Single weights may differ more: Adam makes full steps of what is all rounding.
            assert (value - alone[name]).norm() <= 1e-3 * alone[name].norm(), name


def read_steps(rows: str) -> list[float]:
    return [value for row in rows.splitlines() for value in json.loads(row).values()]


@pytest.mark.parametrize("size", [None, "1"])
def test_world_of_one_opens_nothing(monkeypatch: pytest.MonkeyPatch, size: str | None) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    world = World.from_environment()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    value, tensor = object(), torch.ones(2)
    world.wait()
    world.add_up([tensor])
    assert world.broadcast(value) is value
    assert tensor.tolist() == [1, 1]
    assert world.share([1, 2, 3]) == [1, 2, 3]
    world.close()
    assert not distributed.is_initialized()


def test_world_shares_every_item_once() -> None:
    shares = [World(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert [World(rank, 2).is_main for rank in range(2)] == [True, False]


if __name__ == "__main__":
    joined = World.from_environment()
    assert joined.size == 2
    run_stages(Path(sys.argv[1]), joined)
    for each in ("plain", "grid"):
        train(Path(sys.argv[1]), each, joined)
    joined.close()
