"""The training loop: phases, rounds, steps, and a checkpoint from which it goes on.

A phase is an optimizer and a loss; its rounds are epochs over the teacher's completions or, on
policy, fresh completions of the student's own (`export.student.on_policy`). What a step computes
depends on the recipe and the step's place alone, so a run that was killed and resumed on the same
CPU writes the same bytes as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from export.run.files import write_json
from export.run.processes import World
from export.run.training import PhaseConfig
from export.student.checkpoint import Checkpoints
from export.student.on_policy import COLLAPSE_SHARE
from export.student.step import Forward, StepObjective, StepSums, accumulate, plan_steps, schedule
from export.teacher.examples import Example
from serve.text.real_tokens import EVERY_ROW, RealTokens

TRAINING_NAME, PROBES_NAME = "training.jsonl", "probes.json"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: mean loss terms over its completion tokens, in nats per token (`hidden`
    is a relative squared error)."""

    phase: int
    step: int
    total: float
    soft: float
    hard: float
    hidden: float
    attention: float
    num_tokens: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """What the student's greedy answers are after `step` steps (`export.student.on_policy`)."""

    phase: int
    step: int
    repeated_share: float


@dataclass(frozen=True, slots=True)
class Place:
    """What comes next: a step of a round of a phase, `done` steps of this phase behind it."""

    phase: int = 0
    round: int = 0
    step: int = 0
    done: int = 0


class Parameters(Protocol):
    """What the optimizer moves, and how it gets into the model."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, `base_lr` in each."""
        ...

    def named(self) -> Mapping[str, torch.Tensor]:
        """Return every moved tensor by a name that stays the same between runs."""
        ...

    def gather_gradients(self) -> None:
        """Put gradients where the optimizer looks for them."""
        ...

    def publish(self) -> None:
        """Write the moved tensors into the model."""
        ...


class PlainParameters:
    """The trainable parameters of some modules, moved as they are."""

    def __init__(self, **modules: torch.nn.Module | None) -> None:
        self._named = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See `Parameters`."""
        return [{"params": list(self._named.values()), "base_lr": learning_rate}]

    def named(self) -> Mapping[str, torch.Tensor]:
        """See `Parameters`."""
        return self._named

    def gather_gradients(self) -> None:
        """See `Parameters`: they are there already."""

    def publish(self) -> None:
        """See `Parameters`: they are there already."""


@dataclass(frozen=True, slots=True)
class TrainingPhase:
    """A phase ready to run: `text(round)` gives the examples of each of `num_rounds` rounds, the
    same ones when a resumed run asks again. `on_start` is called before the first step, and again
    by a resumed run, when the weights are in place."""

    config: PhaseConfig
    forward: Forward
    parameters: Parameters
    num_rounds: int
    text: Callable[[int], Sequence[Example]]
    real_tokens: RealTokens = EVERY_ROW
    on_start: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on: `on_step` gets each record and the phase's progress from 0 to 1; `probe`, if
    any, measures the student's own answers before a phase and `num_probes` times in it; `say` gets
    a warning when they collapse into loops."""

    on_step: Callable[[StepRecord, float], None] = lambda record, progress: None
    probe: Callable[[], float] | None = None
    say: Callable[[str], None] = lambda message: None
    num_probes: int = 4


@dataclass(frozen=True, slots=True)
class Log:
    """Everything that was recorded, in order."""

    steps: list[StepRecord] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Log:
        return cls(
            [StepRecord(**step) for step in raw["steps"]],
            [ProbeRecord(**probe) for probe in raw["probes"]],
        )

    def write_steps(self, folder: Path) -> None:
        """Write one JSON row per step."""
        rows = "".join(json.dumps(asdict(step)) + "\n" for step in self.steps)
        (folder / TRAINING_NAME).write_text(rows)

    def write_probes(self, folder: Path) -> None:
        write_json(folder / PROBES_NAME, [asdict(probe) for probe in self.probes])


class Trainer:
    """Runs phases one after the other and keeps a checkpoint in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        checkpoint_every_s: float = 120.0,
        world: World | None = None,
        watch: Watch | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._world = world or World()
        self._checkpoints = Checkpoints(folder, is_writer=self._world.is_main)
        self._every_s = checkpoint_every_s
        self._watch = watch or Watch()
        self._dtype = dtype
        self._log = Log()

    def run(self, phases: Sequence[Callable[[], TrainingPhase]]) -> Log:
        """Train and return the log. A phase is built when its turn comes, and not if it is over.

        Phases share the student, and each moves all that the earlier ones moved in it: a checkpoint
        holds one phase's tensors. A resumed run builds a phase before the weights are in place, so
        what looks at them belongs in `TrainingPhase.on_start`.
        """
        saved = self._checkpoints.load()
        start = Place(**saved.place) if saved else Place()
        self._log = Log.from_json(saved.log) if saved else Log()
        for index in range(start.phase, len(phases)):
            phase, place = phases[index](), Place(phase=index)
            optimizer = _optimizer(phase)
            if saved and index == start.phase:
                place = start
                self._checkpoints.restore(saved, phase.parameters.named(), optimizer)
                phase.parameters.publish()
            elif index > 0:
                self._save(phase, optimizer, place)
            phase.on_start()
            self._run_phase(phase, optimizer, place)
        return self._log

    def _run_phase(
        self, phase: TrainingPhase, optimizer: torch.optim.Optimizer, place: Place
    ) -> None:
        phase.forward.student.eval()  # dropout would depend on more than the step's place
        saved_s = time.monotonic()
        if place.done == 0:
            self._probe(place)
        while place.round < phase.num_rounds:
            steps = plan_steps(phase.text(place.round), phase.config, place.round)
            while place.step < len(steps):
                self._step(phase, optimizer, place, steps)
                place = replace(place, step=place.step + 1, done=place.done + 1)
                if self._is_probe_due(phase, place, len(steps)):
                    self._probe(place)
                if self._world.broadcast(time.monotonic() - saved_s >= self._every_s):
                    self._save(phase, optimizer, place)
                    saved_s = time.monotonic()
            place = replace(place, round=place.round + 1, step=0)

    def _step(
        self,
        phase: TrainingPhase,
        optimizer: torch.optim.Optimizer,
        place: Place,
        steps: Sequence[Sequence[Sequence[Example]]],
    ) -> None:
        progress = (place.round + (place.step + 0.5) / len(steps)) / phase.num_rounds
        factor = schedule(progress, phase.config.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        objective = StepObjective.of(phase.config, phase.real_tokens)
        sums = accumulate(
            phase.forward, steps[place.step], objective, world=self._world, dtype=self._dtype
        )
        phase.parameters.gather_gradients()
        moved = list(phase.parameters.named().values())
        self._world.add_up(_gradients(moved))
        torch.nn.utils.clip_grad_norm_(moved, phase.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phase.parameters.publish()
        record = _record(place, sums, phase.config.learning_rate * factor)
        self._log.steps.append(record)
        done = (place.round + (place.step + 1) / len(steps)) / phase.num_rounds
        self._watch.on_step(record, done)

    def _is_probe_due(self, phase: TrainingPhase, place: Place, num_steps: int) -> bool:
        """Whether the last of so many steps of the round crossed a `num_probes`-th of the phase."""
        total = phase.num_rounds * num_steps
        done, num_probes = place.round * num_steps + place.step, self._watch.num_probes
        return done * num_probes // total > (done - 1) * num_probes // total

    def _probe(self, place: Place) -> None:
        if self._watch.probe is None:
            return
        share = self._world.broadcast(self._watch.probe() if self._world.is_main else 0.0)
        earlier = [probe.repeated_share for probe in self._log.probes]
        self._log.probes.append(ProbeRecord(place.phase, place.done, share))
        if earlier and share > COLLAPSE_SHARE >= max(earlier):
            self._watch.say(
                f"warning: after step {place.done} of phase {place.phase}, {share:.0%} of the "
                "4-grams in the student's own answers are repetitions: it falls into loops; try a "
                "lower learning_rate"
            )

    def _save(self, phase: TrainingPhase, optimizer: torch.optim.Optimizer, place: Place) -> None:
        tensors = phase.parameters.named()
        self._checkpoints.save(asdict(place), asdict(self._log), tensors, optimizer)
        self._world.wait()


def _optimizer(phase: TrainingPhase) -> torch.optim.AdamW:
    config = phase.config
    return torch.optim.AdamW(
        phase.parameters.groups(config.learning_rate),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _gradients(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradient of each, zeros where this process had nothing to do with it."""
    for tensor in tensors:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _record(place: Place, sums: StepSums, learning_rate: float) -> StepRecord:
    return StepRecord(
        phase=place.phase,
        step=place.done,
        total=sums.total / sums.num_tokens,
        soft=sums.soft / sums.num_tokens,
        hard=sums.hard / sums.num_tokens,
        hidden=sums.hidden / sums.num_tokens,
        attention=sums.attention / sums.num_tokens,
        num_tokens=sums.num_tokens,
        learning_rate=learning_rate,
    )
