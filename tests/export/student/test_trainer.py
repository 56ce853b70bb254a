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
from export.student import phases as phases_module
from export.student.grid import BlockGrid
from export.student.phases import Distillation, GridTraining, Text, linear_grids
from export.student.prune import drop_layers
from export.student.step import Pair, schedule
from export.student.trainer import Log, PlainParameters, Trainer, TrainingPhase, Watch
from export.teacher.examples import Example
from serve.text.real_tokens import EVERY_ROW
from tests.support.random_models import random_examples, random_model

Builder = Callable[[], TrainingPhase]
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
RUNS = [*RECIPES, "grid"]


class KillError(Exception):
    """What stands in for a kill."""


class Run:
    """A student in training, as a fresh process would build it."""

    def __init__(self, kind: str, random_model: MakeModel, examples: list[Example], folder: Path):
        teacher = random_model(num_layers=3)
        text = Text(examples, examples[:2], frozenset({2}))
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.phases: list[Builder]
        if kind == "grid":
            self.student = random_model(num_layers=3)
            grids = linear_grids(self.student, lambda name: BlockGrid(4, 16))
            grid = GridTraining(self.student, teacher, grids, {}, PHASE, text)
            self.phases = [grid.phase]
            return
        self.student = drop_layers(teacher, [0, 2])
        self.distillation = Distillation(
            self.student, teacher, text, folder,
            config=DistillConfig(phases=tuple(RECIPES[kind])),
            sample=SampleConfig(max_tokens=5, temperature=1.0),
            kept_layers=[0, 2], cache=None, real_tokens=EVERY_ROW, world=World(),
        )  # fmt: skip
        self.phases = self.distillation.phases()

    def train(self, *, stop_at: int | None = None, checkpoint_every_s: float = 1e-9) -> Log:
        """Train to the end, or raise KillError in the step of that number (of this process)."""
        steps = iter(range(1, 1000))

        def on_step(record: Any, progress: float) -> None:
            if next(steps) == stop_at:
                raise KillError

        trainer = Trainer(
            self.folder / "checkpoints",
            checkpoint_every_s=checkpoint_every_s,
            watch=Watch(on_step, self.probe, num_probes=3),
            dtype=torch.float32,
        )
        return trainer.run(self.phases)

    def probe(self) -> float:
        """A number that follows from the weights, in place of the answers' repetition."""
        return float(self.student.model.norm.weight.detach().sum().abs()) % 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.student.state_dict().items()}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(kind: str = "one phase", folder: str = "run") -> Run:
        return Run(kind, random_model, random_examples(LENGTHS), tmp_path / folder)

    return make


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not actual[name].equal(expected[name])] == []


# --- killed and resumed


@pytest.mark.parametrize("kind", RUNS)
def test_run_killed_in_every_step_ends_as_one_that_was_not(
    make_run: Callable[..., Run], kind: str
) -> None:
    whole = make_run(kind, "whole")
    log = whole.train()
    assert len(log.steps) >= 3 and len({p.repeated_share for p in log.probes}) >= 3
    kills = 0
    for _ in log.steps:
        run = make_run(kind, "killed")
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


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_kill_before_any_checkpoint_begins_again(
    make_run: Callable[..., Run], stop_at: int
) -> None:
    whole = make_run("two phases", "whole")
    log = whole.train()
    with pytest.raises(KillError):
        make_run("two phases", "killed").train(stop_at=stop_at, checkpoint_every_s=1e9)
    run = make_run("two phases", "killed")
    assert run.train(checkpoint_every_s=1e9) == log
    assert_same(run.weights(), whole.weights())


def test_kill_between_two_phases_measures_the_trained_student(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run("matching", "whole")
    whole.train()
    first, *_ = whole.distillation.held_out.forward_kl
    measure = phases_module.measure_kl
    values = iter([first])

    def measure_once(*args: Any, **kwargs: Any) -> float:
        for value in values:
            return value
        raise KillError

    monkeypatch.setattr(phases_module, "measure_kl", measure_once)
    with pytest.raises(KillError):
        make_run("matching", "killed").train()
    monkeypatch.setattr(phases_module, "measure_kl", measure)
    run = make_run("matching", "killed")
    run.train()
    assert run.distillation.held_out.forward_kl == whole.distillation.held_out.forward_kl
    assert_same(run.weights(), whole.weights())


def test_finished_run_is_not_trained_again(make_run: Callable[..., Run]) -> None:
    first = make_run()
    log = first.train()
    again = make_run()
    assert again.train(stop_at=1) == log
    assert_same(again.weights(), first.weights())


def test_resume_within_an_on_policy_round_reads_the_same_answers(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    with pytest.raises(KillError):
        make_run("on policy").train(stop_at=2)
    path = tmp_path / "run" / "on-policy-0-0.json"
    before = path.read_bytes()
    run = make_run("on policy")
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


def test_sigkill_in_the_middle_of_training_changes_no_byte(tmp_path: Path) -> None:
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


def test_training_reduces_the_kl() -> None:
    teacher = random_model(num_layers=2)
    student, examples = drop_layers(teacher, [0]), random_examples([(4, 12)] * 8)
    phase = PhaseConfig(num_epochs=15, learning_rate=3e-3, tokens_per_step=64, alpha=1.0)
    training = TrainingPhase(
        phase, Pair(student, teacher), PlainParameters(student=student), 15, lambda _: examples
    )
    log = Trainer(Path("never-written")).run([lambda: training])
    assert log.steps[-1].soft < 0.5 * log.steps[0].soft
    assert not student.training


def test_same_seed_gives_the_same_weights_and_another_does_not(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = make_run(folder="a"), make_run(folder="b")
    assert first.train() == again.train()
    assert_same(first.weights(), again.weights())
    monkeypatch.setitem(
        RECIPES, "one phase", [PHASE.model_copy(update={"seed": 5, "num_epochs": 2})]
    )
    other = make_run(folder="c")
    other.train()
    assert not all(value.equal(other.weights()[n]) for n, value in first.weights().items())


def test_every_step_is_recorded_and_shown(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("two phases")
    shown: list[Any] = []
    trainer = Trainer(
        tmp_path / "checkpoints",
        watch=Watch(lambda record, progress: shown.append((record, progress))),
        dtype=torch.float32,
    )
    log = trainer.run(run.phases)
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
    log.write_steps(tmp_path / "training.jsonl")
    rows = (tmp_path / "training.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [asdict(record) for record in log.steps]


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
def test_shared_parameters_and_the_teacher_stay_as_they_are(
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


def train_with_probes(run: Run, shares: list[float], said: list[str], num_probes: int = 3) -> Log:
    values = iter(shares)
    watch = Watch(probe=lambda: next(values), say=said.append, num_probes=num_probes)
    return Trainer(run.folder / "checkpoints", watch=watch, dtype=torch.float32).run(run.phases)


def test_answers_are_probed_before_a_phase_and_evenly_in_it(make_run: Callable[..., Run]) -> None:
    log = train_with_probes(make_run("two phases"), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], [])
    places = [(probe.phase, probe.step) for probe in log.probes]
    assert places == [(phase, step) for phase in (0, 1) for step in (0, 1, 2, 3)]
    assert [probe.repeated_share for probe in log.probes[:4]] == [0.0, 0.1, 0.2, 0.3]


def test_collapse_is_said_once_with_phase_step_and_share(make_run: Callable[..., Run]) -> None:
    said: list[str] = []
    train_with_probes(make_run("two phases"), [0.1, 0.5, 0.2, 0.3, 0.4, 0.51, 0.9, 0.9], said)
    (line,) = said
    assert line.startswith("warning: ") and "step 1 of phase 1" in line and "51%" in line


def test_student_that_repeated_itself_from_the_start_is_not_warned_of(
    make_run: Callable[..., Run],
) -> None:
    said: list[str] = []
    train_with_probes(make_run(), [0.8, 0.9, 0.2, 0.9], said)
    assert said == []


def test_probing_does_not_disturb_training(make_run: Callable[..., Run]) -> None:
    quiet, watched = make_run("one phase", "quiet"), make_run("one phase", "watched")
    train_quiet = Trainer(quiet.folder / "checkpoints", dtype=torch.float32)
    steps = train_quiet.run(quiet.phases).steps
    watch = Watch(probe=watched.distillation.probe, num_probes=2)
    trainer = Trainer(watched.folder / "checkpoints", watch=watch, dtype=torch.float32)
    log = trainer.run(watched.phases)
    assert log.steps == steps and len(log.probes) == 3
    assert_same(watched.weights(), quiet.weights())


if __name__ == "__main__":
    train_folder(Path(sys.argv[1]), lambda step: print(step, flush=True))
