"""What the training stages train: from a recipe's phases to phases that a `Trainer` runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bundle.atomic import write_atomically
from export.run.errors import ExportError
from export.run.processes import World
from export.run.settings import SampleConfig
from export.run.training import DistillConfig, PhaseConfig
from export.student.grid import BlockGrid, GridWeight
from export.student.grid_training import GridParameters, untie_head
from export.student.logits_cache import LogitsCache
from export.student.matching import LayerMap, Matching
from export.student.on_policy import AnswerSettings, answer, repetition
from export.student.step import CachedPair, Forward, Pair, measure_kl
from export.student.trainer import PlainParameters, TrainingPhase
from export.teacher.examples import Example
from serve.text.real_tokens import EVERY_ROW, RealTokens

# Prompts answered greedily to see whether the student still speaks.
NUM_PROBE_PROMPTS = 8
_PROBE_MAX_TOKENS = 48
HELD_OUT_NAME = "held_out.json"


@dataclass(frozen=True, slots=True)
class Text:
    """What is trained on and measured: the teacher's accepted and held-out completions."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    eos_token_ids: frozenset[int]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The training prompts, each once."""
        return list(dict.fromkeys(example.prompt_token_ids for example in self.train))


@dataclass
class HeldOutLog:
    """KL(teacher ‖ student) on held-out text before the first phase and behind each, in nats per
    token, in the arithmetic of training; kept in the stage's folder."""

    path: Path
    forward_kl: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> HeldOutLog:
        path = folder / HELD_OUT_NAME
        found = json.loads(path.read_text()) if path.exists() else []
        return cls(path, found)

    def add(self, number: int, measure: Callable[[], float]) -> None:
        """Measure and write value `number`, unless it is there already."""
        if len(self.forward_kl) <= number:
            self.forward_kl.append(measure())
            with write_atomically(self.path) as partial:
                partial.write_text(json.dumps(self.forward_kl))


class Distillation:
    """The phases of a recipe over one student and one teacher, whose attention they may switch.

    ExportError when shared layers are to be frozen and there are none.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        text: Text,
        folder: Path,
        *,
        config: DistillConfig,
        sample: SampleConfig,
        kept_layers: Sequence[int] | None,
        cache: LogitsCache | None,
        real_tokens: RealTokens,
        world: World,
    ) -> None:
        self.student = student
        self._teacher = teacher
        self._text = text
        self._folder = folder
        self._config = config
        self._sample = sample
        self._kept_layers = kept_layers
        self._cache = cache
        self._real_tokens = real_tokens
        self._world = world
        self.held_out = HeldOutLog.open(folder)
        num_shared = 0
        if config.freeze_shared_layers:
            num_shared = _count_shared_layers(student, teacher, kept_layers)
        self._plain = Pair(student, teacher, num_shared)

    def phases(self) -> list[Callable[[], TrainingPhase]]:
        """Return a builder per phase, for `Trainer.run`."""
        return [
            lambda index=index, phase=phase: self._build(index, phase)  # type: ignore[misc]
            for index, phase in enumerate(self._config.phases)
        ]

    def measure(self, number: int) -> None:
        """Add the held-out KL `number` phases in (`HeldOutLog`); the main process does."""
        if self._world.is_main:
            self.held_out.add(number, self._measure)

    def _measure(self) -> float:
        return measure_kl(self._plain, self._text.held_out, real_tokens=self._real_tokens)

    def probe(self) -> float:
        """Return the share of repeated 4-grams in the student's greedy answers."""
        settings = AnswerSettings(
            temperature=0.0,
            max_tokens=_PROBE_MAX_TOKENS,
            max_num_seqs=NUM_PROBE_PROMPTS,
            eos_token_ids=self._text.eos_token_ids,
        )
        prompts = self._text.prompts[:NUM_PROBE_PROMPTS]
        return repetition(answer(self.student, prompts, settings, self._real_tokens))

    def _build(self, index: int, phase: PhaseConfig) -> TrainingPhase:
        # Whatever the phase before had: a resumed run starts here.
        for model in (self.student, self._teacher):
            model.set_attn_implementation("eager" if phase.attention_weight else "sdpa")
        matching = self._matching(phase)
        return TrainingPhase(
            config=phase,
            forward=self._forward(phase, matching),
            parameters=PlainParameters(student=self.student, matching=matching),
            num_rounds=self._num_rounds(phase),
            text=self._text_of(index, phase),
            real_tokens=self._real_tokens,
            on_start=lambda: self.measure(index),
        )

    def _forward(self, phase: PhaseConfig, matching: Matching | None) -> Forward:
        if phase.teacher_logits == "cache":
            assert self._cache is not None, "refused by the recipe's schema"
            return CachedPair(self.student, self._cache)
        if matching is None:
            return self._plain
        return Pair(self.student, self._teacher, matching=matching)

    def _matching(self, phase: PhaseConfig) -> Matching | None:
        if not (phase.hidden_weight or phase.attention_weight):
            return None
        student, teacher = self.student.config, self._teacher.config
        num_layers = teacher.num_hidden_layers
        layer_map = (
            LayerMap.of_pruned(self._kept_layers, num_layers)
            if self._kept_layers is not None
            else LayerMap.by_depth(student.num_hidden_layers, num_layers)
        )
        return Matching(layer_map, student.hidden_size, teacher.hidden_size)

    def _num_rounds(self, phase: PhaseConfig) -> int:
        if phase.data == "teacher":
            return phase.num_epochs
        num_prompts = len(self._text.prompts)
        return phase.num_epochs * math.ceil(num_prompts / phase.num_prompts_per_round)

    def _text_of(self, index: int, phase: PhaseConfig) -> Callable[[int], Sequence[Example]]:
        if phase.data == "teacher":
            return lambda _: self._text.train
        return lambda round_index: self._answers(index, phase, round_index)

    def _answers(self, index: int, phase: PhaseConfig, round_index: int) -> list[Example]:
        """Return the student's own completions for a round, from disk where a run left them."""
        path = self._folder / f"on-policy-{index}-{round_index}.json"
        if self._world.is_main and not path.exists():
            settings = AnswerSettings(
                temperature=self._sample.temperature,
                max_tokens=self._sample.max_tokens,
                max_num_seqs=self._sample.max_num_seqs,
                eos_token_ids=self._text.eos_token_ids,
                seed=phase.seed * 1_000_003 + round_index * phase.num_prompts_per_round,
            )
            prompts = round_prompts(self._text.prompts, phase, round_index)
            answers = answer(self.student, prompts, settings, self._real_tokens)
            with write_atomically(path) as partial:
                partial.write_text(json.dumps([asdict(example) for example in answers]))
        self._world.wait()
        return [
            Example(tuple(raw["prompt_token_ids"]), tuple(raw["completion_token_ids"]))
            for raw in json.loads(path.read_text())
        ]


def round_prompts(
    prompts: Sequence[tuple[int, ...]], phase: PhaseConfig, round_index: int
) -> list[tuple[int, ...]]:
    """Return the prompts of an on-policy round: a random order per epoch, cut into rounds."""
    rounds_per_epoch = math.ceil(len(prompts) / phase.num_prompts_per_round)
    epoch, part = divmod(round_index, rounds_per_epoch)
    shuffled = list(prompts)
    random.Random(f"{phase.seed}/{epoch}").shuffle(shuffled)
    return shuffled[part * phase.num_prompts_per_round :][: phase.num_prompts_per_round]


class GridTraining:
    """Quantization-aware training: the float student teaches its own copy on a grid."""

    def __init__(
        self,
        student: Any,
        float_student: Any,
        grids: Mapping[str, BlockGrid],
        initial: Mapping[str, GridWeight],
        phase: PhaseConfig,
        text: Text,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> None:
        untie_head(student)
        self.student = student
        self.parameters = GridParameters(student, grids, initial)
        self._forward = Pair(student, float_student)
        self._phase = phase
        self._text = text
        self._real_tokens = real_tokens

    def phase(self) -> TrainingPhase:
        """Return the one phase there is, for `Trainer.run`."""
        return TrainingPhase(
            config=self._phase,
            forward=self._forward,
            parameters=self.parameters,
            num_rounds=self._phase.num_epochs,
            text=lambda _: self._text.train,
            real_tokens=self._real_tokens,
        )

    def measure(self) -> float:
        """Return KL(float student ‖ student on its grid) on held-out text, in nats per token."""
        return measure_kl(self._forward, self._text.held_out, real_tokens=self._real_tokens)


def linear_grids(model: Any, grid_of: Callable[[str], BlockGrid]) -> dict[str, BlockGrid]:
    """Return the grid of every linear layer by module name; `grid_of` gets the layer's own name,
    q_proj, k_proj and v_proj under that of the packed `qkv_proj`."""
    packed = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    lasts = {name: name.rpartition(".")[2] for name in names}
    return {name: grid_of(packed.get(last, last)) for name, last in lasts.items()}


def _count_shared_layers(student: Any, teacher: Any, kept_layers: Sequence[int] | None) -> int:
    """Return how many of the lowest layers the student has as the teacher has them."""
    kept = list(kept_layers or ())
    num_shared = next((i for i, layer in enumerate(kept) if i != layer), len(kept))
    is_narrower = student.config.intermediate_size != teacher.config.intermediate_size
    if is_narrower or not num_shared:
        raise ExportError(
            "distill.freeze_shared_layers is true, but no low layer of the student is as the "
            "teacher has it: set it to false, or prune the student from the teacher with "
            "first_candidate 1 or more and kept_mlp_share 1"
        )
    return num_shared
