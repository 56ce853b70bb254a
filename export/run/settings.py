"""What an export run is told: strict YAML. Unknown keys and values out of bounds fail by name.

Each stage's section is all that the stage depends on besides the stages before it: a changed
option reruns that stage and what follows, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    model_validator,
)

from bundle.manifest import VariantName
from export.run.errors import ContradictionError, Fault
from export.run.training import DistillConfig, Section
from export.run.variants import FLOAT_VARIANT, VariantConfig, WeightOnlyVariant


class BuiltinSource(Section):
    """The built-in task set (`export.teacher.tasks`); `families` keeps only those."""

    kind: Literal["builtin"] = "builtin"
    families: tuple[str, ...] | None = None


class JsonlSource(Section):
    """Prompts of the user's own: one JSON object per line (`export.teacher.task_rows`)."""

    kind: Literal["jsonl"]
    path: Path
    format: Literal["auto", "prompt", "messages", "instruction", "question"] = Field(
        default="auto", description="what the rows are; auto: by their columns"
    )


class ReasoningGymSource(Section):
    """Generated tasks of the package reasoning-gym (extra `reasoning-gym`)."""

    kind: Literal["reasoning_gym"]
    dataset: str
    size: int = Field(default=500, gt=0)
    seed: int = 0
    options: dict[str, JsonValue] = Field(default={}, description="given to create_dataset")


TaskSource = Annotated[
    BuiltinSource | JsonlSource | ReasoningGymSource, Field(discriminator="kind")
]


class TasksConfig(Section):
    """Which prompts: every source, cut to so many of each split."""

    sources: tuple[TaskSource, ...] = Field(default=(BuiltinSource(),), min_length=1)
    seed: int = 0
    max_train: int = Field(default=1600, gt=0)
    max_test: int = Field(default=64, gt=0)
    on_bad_row: Literal["refuse", "drop"] = Field(
        default="refuse", description="a faulty row, or a prompt that is too long; drop: and count"
    )


class SampleConfig(Section):
    """How the teacher answers; `max_num_seqs` completions at a time.

    Prompts whose answer can be checked get `num_verifiable_samples`, so that rejection sampling
    has a choice and pass rates mean something.
    """

    num_samples: int = Field(default=1, gt=0)
    num_verifiable_samples: int = Field(default=1, gt=0)
    temperature: float = Field(default=0.8, ge=0)
    max_tokens: int = Field(default=96, gt=0)
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_num_seqs: int = Field(default=64, gt=0)
    max_model_len: int = Field(default=1024, gt=1)


class AcceptConfig(Section):
    """Which completions are trained on (`export.teacher.accept`; DeepSeek-R1, 2.3.3)."""

    require_correct: bool = Field(default=True, description="where the answer can be checked")
    drop_truncated: bool = Field(default=True, description="completions cut at max_tokens")
    max_repetition: float = Field(
        default=0.5, gt=0, le=1, description="largest share of repeated 4-grams of tokens"
    )
    max_foreign_letters: float = Field(
        default=0.1, ge=0, le=1, description="largest share of letters in scripts not in the prompt"
    )
    max_per_prompt: int = Field(default=2, gt=0)
    min_pass_rate: float = Field(default=0.0, ge=0, le=1)
    max_pass_rate: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check_band(self) -> AcceptConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate {self.min_pass_rate} exceeds max_pass_rate {self.max_pass_rate}"
            )
        return self


class CacheConfig(Section):
    """The teacher's logits on disk (`export.student.logits_cache`), for students that follow."""

    kind: Literal["none", "dense", "top_k", "random_sampling"] = "none"
    top_k: int = Field(default=64, gt=0)
    num_draws: int = Field(default=64, gt=0, description="of random_sampling, per position")
    seed: int = 0


class PruneConfig(Section):
    """How a student is cut out of the teacher (`export.student.prune`)."""

    num_removed_layers: int = Field(default=4, ge=0)
    first_candidate: int = Field(default=1, ge=0, description="layers below it are kept")
    num_candidates: int = Field(default=6, gt=0, description="tried after the first round")
    num_texts: int = Field(default=8, gt=0)
    kept_mlp_share: float = Field(
        default=1.0, gt=0, le=1, description="share of MLP channels kept, by activation importance"
    )


class OnnxConfig(Section):
    max_model_len: int = Field(default=2048, gt=1, description="positions of the rotary tables")


class EvaluateConfig(Section):
    """The measurements: held-out text, sampled answers to tasks, and timed decoding."""

    max_num_seqs: int = Field(default=16, gt=0)
    num_samples: int = Field(default=8, gt=0, description="n of pass@k and maj@k, per task")
    k: tuple[int, ...] = (1, 8)
    max_task_prompts: int = Field(default=32, ge=0, description="verifiable test prompts answered")
    task_max_tokens: int = Field(default=48, gt=0)
    temperature: float = Field(default=0.8, ge=0)
    num_timed_tokens: int = Field(default=48, gt=1)
    num_rounds: int = Field(default=3, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _check_k(self) -> EvaluateConfig:
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(f"k {wrong[0]} is outside 1 to num_samples {self.num_samples}")
        return self


class GatesConfig(Section):
    """What each hop may cost: mean KL in nats per token; logits as they are."""

    onnx_kl: float = Field(default=1e-6, ge=0)
    onnx_logit_difference: float = Field(default=1e-3, ge=0)
    quantized_kl: float = Field(default=0.02, ge=0)
    trained_kl: float = Field(
        default=0.05,
        ge=0,
        description="in place of quantized_kl for variants trained on their grid",
    )
    student_kl: float = Field(default=0.40, ge=0, description="KL(teacher ‖ student), held out")


class SelectConfig(Section):
    """How the default is chosen of variants that passed gates (`export.publish.select`)."""

    rule: Literal["fastest", "lowest_kl", "knee"] = "fastest"
    max_kl_excess: float | None = Field(
        default=None, ge=0, description="over the lowest KL(teacher ‖ variant), nats per token"
    )


class ExportConfig(Section):
    """A whole run. `teacher` takes what `export.teacher.source.resolve_teacher` takes."""

    teacher: str
    output_dir: Path
    cache_dir: Path = Path("runs/cache")
    tasks: TasksConfig = TasksConfig()
    sample: SampleConfig = SampleConfig()
    accept: AcceptConfig = AcceptConfig()
    cache: CacheConfig = CacheConfig()
    student: str | None = Field(
        default=None, description="a compatible pretrained checkpoint, instead of pruning"
    )
    prune: PruneConfig = PruneConfig()
    distill: DistillConfig = DistillConfig()
    onnx: OnnxConfig = OnnxConfig()
    variants: dict[VariantName, VariantConfig] = Field(
        default={
            "int8": WeightOnlyVariant(bits=8, block_size=128),
            "int4": WeightOnlyVariant(bits=4, block_size=32),
        }
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()
    select: SelectConfig = SelectConfig()

    @property
    def reads_cache(self) -> bool:
        """Whether any phase of training reads the teacher's logits from the cache."""
        return any(phase.teacher_logits == "cache" for phase in self.distill.phases)

    @model_validator(mode="after")
    def _check_together(self) -> ExportConfig:
        faults = [*self._faults_of_sections(), *self._faults_of_cache(), *self._faults_of_sharing()]
        if faults:
            raise ContradictionError(faults)
        return self

    def _faults_of_sections(self) -> Iterator[Fault]:
        if FLOAT_VARIANT in self.variants:
            yield f"variants.{FLOAT_VARIANT}", "is always exported; leave it out"
        if self.prune.num_texts > self.tasks.max_train:
            yield (
                "prune.num_texts",
                f"{self.prune.num_texts} exceeds tasks.max_train {self.tasks.max_train}, from "
                "which the texts are drawn",
            )

    def _faults_of_cache(self) -> Iterator[Fault]:
        kind = self.cache.kind
        for index, phase in enumerate(self.distill.phases):
            if phase.teacher_logits != "cache":
                continue
            name = f"distill.phases.{index}"
            if kind == "none":
                yield (
                    f"{name}.teacher_logits",
                    "is 'cache', but cache.kind is 'none': choose dense, top_k or random_sampling",
                )
            # What a tail or a draw at T = 1 becomes at another T depends on logits not kept.
            elif kind != "dense" and phase.temperature != 1.0:
                yield (
                    f"{name}.temperature",
                    f"{phase.temperature} needs all of the teacher's logits, which cache.kind "
                    f"{kind!r} does not keep: set it to 1, or choose cache.kind dense",
                )
            if kind == "random_sampling" and phase.divergence != "forward_kl":
                yield (
                    f"{name}.divergence",
                    f"{phase.divergence!r} cannot be had from the draws of cache.kind "
                    "'random_sampling': choose forward_kl, or cache.kind dense or top_k",
                )

    def _faults_of_sharing(self) -> Iterator[Fault]:
        if not self.distill.freeze_shared_layers:
            return
        name = "distill.freeze_shared_layers"
        if self.student is not None:
            yield (
                name,
                f"true with student {self.student!r}: a pretrained student shares no layers; set "
                "it to false",
            )
        if self.prune.kept_mlp_share < 1:
            yield (
                name,
                f"true with prune.kept_mlp_share {self.prune.kept_mlp_share}: narrower layers are "
                "not the teacher's; set one to false or the other to 1",
            )
        if self.prune.first_candidate == 0 and self.prune.num_removed_layers:
            yield (
                name,
                "true with prune.first_candidate 0: the lowest layer may go, and then none is "
                "shared; set one to false or the other to 1",
            )
        for index, phase in enumerate(self.distill.phases):
            for key in ("hidden_weight", "attention_weight"):
                if value := getattr(phase, key):
                    yield (
                        name,
                        f"true with distill.phases.{index}.{key} {value}: matching needs both "
                        "models whole; set one to false or the other to 0",
                    )
