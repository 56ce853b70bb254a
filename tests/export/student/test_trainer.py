from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from export.run.processes import World
from export.run.settings import SampleConfig
from export.run.training import DistillConfig, PhaseConfig
from export.student.grid import BlockGrid
from export.student.phases import Distillation, GridTraining, Text, linear_grids
from export.student.prune import drop_layers
from export.student.step import Pair, schedule
from export.student.trainer import Log, PlainParameters, Trainer, TrainingPhase, Watch
from export.teacher.examples import Example
from serve.text.real_tokens import EVERY_ROW
from tests.support.random_models import random_examples, random_model

LENGTHS = [(3, 5), (5, 5), (2, 5), (4, 5), (3, 5), (6, 5)]
# Three steps an epoch.
PHASE = PhaseConfig(learning_rate=1e-2, tokens_per_step=10, tokens_per_micro_batch=24, seed=1)
RECIPES = {
    "one phase": [PHASE.model_copy(update={"num_epochs": 2})],
    "two phases": [PHASE, PHASE.model_copy(update={"alpha": 1.0, "seed": 2})],
    "matching": [
        PHASE.model_copy(update={"hidden_weight": 0.5, "attention_weight": 0.5}),
        PHASE.model_copy(update={"hidden_weight": 0.5}),
    ],
    "on policy": [
        PHASE.model_copy(
            update={"data": "student", "num_prompts_per_round": 4, "tokens_per_step": 8}
        )
    ],
}
RUNS = ["two phases", "matching", "on policy", "grid"]


class KillError(Exception):
    """What stands in for a kill."""


class Run:
    """A student in training, as a fresh process would build it."""

    def __init__(self, folder: Path, kind: str = "one phase") -> None:
        examples, teacher = random_examples(LENGTHS), random_model(num_layers=3)
        text = Text(examples, examples[:2], frozenset({2}))
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.phases: list[Callable[[], TrainingPhase]]
        if kind == "grid":
            self.student = random_model(num_layers=3)
            grids = linear_grids(self.student, lambda name: BlockGrid(4, 16))
            self.phases = [GridTraining(self.student, teacher, grids, {}, PHASE, text).phase]
            return
        self.student = drop_layers(teacher, [0, 2])
        self.distillation = Distillation(
            self.student, teacher, text, folder,
            config=DistillConfig(phases=tuple(RECIPES[kind])),
            sample=SampleConfig(max_tokens=5, temperature=1.0),
            kept_layers=[0, 2], cache=None, real_tokens=EVERY_ROW, world=World(),
        )  # fmt: skip
        self.phases = self.distillation.phases()

    def train(
        self, watch: Watch | None = None, *, stop_at: int = 0, checkpoint_every_s: float = 1e-9
    ) -> Log:
        """Train to the end, or raise KillError in the step of that number (of this process)."""
        steps = iter(range(1, 1000))

        def on_step(record: Any, progress: float) -> None:
            if next(steps) == stop_at:
                raise KillError

        return Trainer(
            self.folder / "checkpoints",
            checkpoint_every_s=checkpoint_every_s,
            watch=watch or Watch(on_step, self.probe, num_probes=3),
            dtype=torch.float32,
        ).run(self.phases)

    def probe(self) -> float:
        """A number that follows from the weights, in place of the answers' repetition."""
        return float(self.student.model.norm.weight.detach().sum().abs()) % 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.student.state_dict().items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not actual[name].equal(expected[name])] == []


# --- killed and resumed


@pytest.mark.parametrize("kind", RUNS)
def test_run_killed_in_every_step_ends_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    whole = Run(tmp_path / "whole", kind)
    log = whole.train()
    assert len(log.steps) >= 3 and len({p.repeated_share for p in log.probes}) >= 3
    kills = 0
    for _ in log.steps:
        run = Run(tmp_path / "killed", kind)
        try:
            resumed = run.train(stop_at=2)  # the first step of each process is kept
            break
        except KillError:
            kills += 1
    assert kills == len(log.steps) - 1
    assert resumed == log
    assert_same(run.weights(), whole.weights())
    if kind != "grid":
        assert run.distillation.held_out.forward_kl == whole.distillation.held_out.forward_kl


@pytest.mark.parametrize("stop_at", [1, 4])
def test_run_killed_before_any_checkpoint_begins_again(tmp_path: Path, stop_at: int) -> None:
    whole = Run(tmp_path / "whole", "two phases")
    log = whole.train()
    with pytest.raises(KillError):
        Run(tmp_path / "killed", "two phases").train(stop_at=stop_at, checkpoint_every_s=1e9)
    run = Run(tmp_path / "killed", "two phases")
    assert run.train(checkpoint_every_s=1e9) == log
    assert_same(run.weights(), whole.weights())


def test_run_killed_between_two_phases_measures_the_trained_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(tmp_path / "whole", "matching")
    whole.train()
    first, *_ = whole.distillation.held_out.forward_kl
    values = iter([first])

    def measure_once(*args: Any, **kwargs: Any) -> float:
        for value in values:
            return value
        raise KillError

    with monkeypatch.context() as patch, pytest.raises(KillError):
        patch.setattr("export.student.phases.measure_kl", measure_once)
        Run(tmp_path / "killed", "matching").train()
    run = Run(tmp_path / "killed", "matching")
    run.train()
    assert run.distillation.held_out.forward_kl == whole.distillation.held_out.forward_kl
    assert_same(run.weights(), whole.weights())


def test_run_that_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    first, again = Run(tmp_path), Run(tmp_path)
    log = first.train()
    assert again.train(stop_at=1) == log
    assert_same(again.weights(), first.weights())


def test_run_resumed_within_an_on_policy_round_reads_the_same_answers(tmp_path: Path) -> None:
    with pytest.raises(KillError):
        Run(tmp_path, "on policy").train(stop_at=2)
    path = tmp_path / "on-policy-0-0.json"
    before = path.read_bytes()
    run = Run(tmp_path, "on policy")
    text = run.phases[0]().text
    with torch.no_grad():
        run.student.model.norm.weight.zero_()
    assert [asdict(e) for e in text(0)] == [
        {name: tuple(ids) for name, ids in raw.items()} for raw in json.loads(before)
    ]
    assert path.read_bytes() == before


# --- a real kill


def train_folder(folder: Path, shown: Callable[[int], None]) -> Path:
    """Train the student in a folder, a checkpoint per step, and return its weights' file."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / n) for n in "st")
    examples = [Example((i, i + 1, i + 2), (i + 3, i + 4)) for i in range(1, 49)]
    phase = PhaseConfig(learning_rate=1e-2, tokens_per_step=4)
    training = TrainingPhase(
        phase, Pair(student, teacher), PlainParameters(student=student), 1, lambda _: examples
    )
    Trainer(
        folder / "checkpoints",
        checkpoint_every_s=1e-9,
        watch=Watch(lambda record, progress: shown(record.step)),
    ).run([lambda: training])
    student.save_pretrained(folder / "done")
    return folder / "done" / "model.safetensors"


@pytest.mark.nightly
def test_sigkill_in_the_middle_of_training_changes_no_byte(
    tmp_path: Path,
) -> None:
    for run in ("killed", "whole"):
        random_model(num_layers=1, seed=1).save_pretrained(tmp_path / run / "s")
        random_model(num_layers=1).save_pretrained(tmp_path / run / "t")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "killed")],
        stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "3\n" in process.stdout  # reads until then
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "done").exists()
    steps: list[int] = []
    paths = [train_folder(tmp_path / "killed", steps.append)]
    assert 3 <= steps[0] < steps[-1] == 23
    paths.append(train_folder(tmp_path / "whole", lambda step: None))
    killed, whole = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    assert killed == whole


# --- what a run does


def test_every_step_is_recorded_and_shown(tmp_path: Path) -> None:
    shown: list[Any] = []
    watch = Watch(lambda record, progress: shown.append((record, progress)))
    log = Run(tmp_path, "two phases").train(watch)
    assert [record for record, _ in shown] == log.steps
    assert [(r.phase, r.step) for r in log.steps] == [(p, s) for p in (0, 1) for s in range(3)]
    assert [progress for _, progress in shown] == pytest.approx([1 / 3, 2 / 3, 1] * 2)
    num_tokens = sum(completion for _, completion in LENGTHS)
    assert sum(record.num_tokens for record in log.steps) == 2 * num_tokens
    for record in log.steps:
        factor = schedule((record.step + 0.5) / 3, PHASE.warmup_share)
        assert record.learning_rate == pytest.approx(PHASE.learning_rate * factor)
        alpha = (0.5, 1.0)[record.phase]
        expected = alpha * 4 * record.soft + (1 - alpha) * record.hard
        assert record.total == pytest.approx(expected, rel=1e-5)
        assert record.hidden == record.attention == 0
    log.write_steps(tmp_path)
    rows = (tmp_path / "training.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [asdict(record) for record in log.steps]


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
def test_training_leaves_shared_parameters_and_the_teacher_as_they_are(
    tmp_path: Path, architecture: str
) -> None:
    teacher = random_model(architecture, num_layers=3)
    student, examples = drop_layers(teacher, [0, 2]), random_examples(LENGTHS)
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in (student, teacher)]
    phase = PHASE.model_copy(update={"weight_decay": 0.1})
    pair = Pair(student, teacher, 1)
    parameters = PlainParameters(student=student)
    training = TrainingPhase(phase, pair, parameters, 1, lambda _: examples)
    Trainer(tmp_path).run([lambda: training])
    changed = {n for n, value in student.state_dict().items() if not value.equal(before[0][n])}
    assert changed == {n for n in before[0] if "layers.1." in n or n == "model.norm.weight"}
    assert_same(dict(teacher.state_dict()), before[1])
    assert all(p.grad is None for p in teacher.parameters())


# --- looks at the student's answers


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (
            [0.1, 0.5, 0.2, 0.3, 0.4, 0.51, 0.9, 0.9],
            ["warning: after step 1 of phase 1, 51% of the 4-grams"],
        ),
        ([0.8, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9], []),  # it repeated itself from the start
    ],
)
def test_probes_are_spread_over_phases_and_warn_once_of_a_collapse(
    tmp_path: Path, shares: list[float], expected: list[str]
) -> None:
    values, said = iter(shares), list[str]()
    watch = Watch(probe=lambda: next(values), say=said.append, num_probes=3)
    log = Run(tmp_path, "two phases").train(watch)
    assert [p.repeated_share for p in log.probes] == shares
    places = [(phase, step) for phase in (0, 1) for step in (0, 1, 2, 3)]
    assert [(probe.phase, probe.step) for probe in log.probes] == places
    assert all(line.startswith(text) for text, line in zip(expected, said, strict=True))


def test_probes_do_not_disturb_training(tmp_path: Path) -> None:
    quiet, watched = Run(tmp_path / "quiet"), Run(tmp_path / "watched")
    steps = quiet.train(Watch()).steps
    log = watched.train(Watch(probe=watched.distillation.probe, num_probes=2))
    assert log.steps == steps
    assert [0 <= probe.repeated_share <= 1 for probe in log.probes] == [True] * 3
    assert_same(watched.weights(), quiet.weights())


if __name__ == "__main__":
    train_folder(Path(sys.argv[1]), lambda step: print(step, flush=True))
