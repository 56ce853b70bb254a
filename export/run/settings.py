"""What an export run is told: strict YAML. Unknown keys and values out of bounds fail by name.

Each stage's section is all that the stage depends on besides the stages before it: a changed
option reruns that stage and what follows, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from bundle.errors import UserError
from bundle.manifest import VariantName

FLOAT_VARIANT = "fp32"


class ExportError(UserError):
    """An export cannot go on; the text says why and what to do."""


class ConfigError(ExportError):
    """A recipe is wrong; a line for each fault names the key, its value and what is allowed."""

    exit_code = 2


Fault = tuple[str, str]
"""A dotted key of a recipe and what is wrong with it."""


class ContradictionError(ValueError):
    """Options that are right by themselves cannot go together."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{key} {text}" for key, text in faults))
        self.faults = tuple(faults)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BuiltinSource(_Section):
    """The built-in task set (`export.teacher.tasks`); `families` keeps only those."""

    kind: Literal["builtin"] = "builtin"
    families: tuple[str, ...] | None = None


class JsonlSource(_Section):
    """Prompts of the user's own: one JSON object per line (`export.teacher.task_rows`)."""

    kind: Literal["jsonl"]
    path: Path
    format: Literal["auto", "prompt", "messages", "instruction", "question"] = Field(
        default="auto", description="what the rows are; auto: by their columns"
    )


class ReasoningGymSource(_Section):
    """Generated tasks of the package reasoning-gym (extra `reasoning-gym`)."""

    kind: Literal["reasoning_gym"]
    dataset: str
    size: int = Field(default=500, gt=0)
    seed: int = 0
    options: dict[str, JsonValue] = Field(default={}, description="given to create_dataset")


TaskSource = Annotated[
    BuiltinSource | JsonlSource | ReasoningGymSource, Field(discriminator="kind")
]


class TasksConfig(_Section):
    """Which prompts: every source, cut to so many of each split."""

    sources: tuple[TaskSource, ...] = Field(default=(BuiltinSource(),), min_length=1)
    seed: int = 0
    max_train: int = Field(default=1600, gt=0)
    max_test: int = Field(default=64, gt=0)
    on_bad_row: Literal["refuse", "drop"] = Field(
        default="refuse", description="a faulty row, or a prompt that is too long; drop: and count"
    )


class SampleConfig(_Section):
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


class AcceptConfig(_Section):
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


class CacheConfig(_Section):
    """The teacher's logits on disk (`export.student.logits_cache`), for students that follow."""

    kind: Literal["none", "dense", "top_k", "random_sampling"] = "none"
    top_k: int = Field(default=64, gt=0)
    num_draws: int = Field(default=64, gt=0, description="of random_sampling, per position")
    seed: int = 0


class PruneConfig(_Section):
    """How a student is cut out of the teacher (`export.student.prune`)."""

    num_removed_layers: int = Field(default=4, ge=0)
    first_candidate: int = Field(default=1, ge=0, description="layers below it are kept")
    num_candidates: int = Field(default=6, gt=0, description="tried after the first round")
    num_texts: int = Field(default=8, gt=0)
    kept_mlp_share: float = Field(
        default=1.0, gt=0, le=1, description="share of MLP channels kept, by activation importance"
    )


class LossConfig(_Section):
    """α·T²·D(teacher_T, student_T) + (1 − α)·CE, plus matching terms (`export.student.losses`)."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="weight of the teacher in jsd")
    alpha: float = Field(default=0.5, ge=0, le=1, description="0: plain fine-tuning on text")
    temperature: float = Field(default=2.0, gt=0)
    hidden_weight: float = Field(default=0.0, ge=0, description="hidden-state matching")
    attention_weight: float = Field(default=0.0, ge=0, description="attention-map matching, nats")


class PhaseConfig(LossConfig):
    """One phase of training: whose text, which loss, which optimizer settings."""

    data: Literal["teacher", "student"] = Field(
        default="teacher", description="whose completions; student: on-policy"
    )
    teacher_logits: Literal["live", "cache"] = "live"
    num_epochs: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    tokens_per_step: int = Field(default=1024, gt=0)
    tokens_per_micro_batch: int = Field(default=2048, gt=0)
    num_prompts_per_round: int = Field(
        default=64, gt=0, description="on-policy: prompts answered between two updates of the text"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _check_sources(self) -> PhaseConfig:
        if self.data == "student" and self.teacher_logits == "cache":
            raise ValueError("teacher_logits 'cache' has no logits of what the student samples")
        if self.teacher_logits == "cache" and (self.hidden_weight or self.attention_weight):
            raise ValueError("teacher_logits 'cache' has neither hidden states nor attention maps")
        return self


class DistillConfig(_Section):
    """The phases of training, one after the other."""

    phases: tuple[PhaseConfig, ...] = Field(default=(PhaseConfig(),), min_length=1)
    freeze_shared_layers: bool = Field(
        default=False,
        description="keep the embedding, the head and the layers below the first removed one as "
        "the teacher has them; they then run once for both models",
    )
    checkpoint_every_s: float = Field(
        default=120.0, gt=0, description="seconds between checkpoints"
    )


class GridConfig(_Section):
    """Integer codes of `bits`, `block_size` of them to a scale."""

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128, 256]


LinearName = Literal["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class WeightOnlyVariant(GridConfig):
    """MatMulNBits: blocks of integer weights that share a scale (`export.graph.quantize`)."""

    method: Literal["rtn", "hqq", "gptq"] = "rtn"
    overrides: dict[LinearName, GridConfig] = Field(
        default={}, description="another grid for some linear layers"
    )
    accuracy_level: int = Field(default=4, ge=0, le=4, description="4: int8 activations")
    symmetric: bool = True
    num_calibration_texts: int = Field(default=64, gt=0, description="for gptq")
    train: PhaseConfig | None = Field(
        default=None, description="quantization-aware distillation from the float student"
    )

    def grid_of(self, linear: str) -> GridConfig:
        """Return the grid of the linear layers of that name."""
        return self.overrides.get(linear, self)  # type: ignore[call-overload,no-any-return]

    @model_validator(mode="after")
    def _check_train(self) -> WeightOnlyVariant:
        if self.train and (self.method == "hqq" or not self.symmetric):
            raise ValueError("train: only symmetric rtn and gptq grids can be trained on")
        if self.train and self.train.data == "student":
            raise ValueError("train.data: the text is the teacher's; give 'teacher'")
        if self.train and self.train.teacher_logits == "cache":
            raise ValueError("train.teacher_logits: the float student is the teacher; give 'live'")
        for key in ("hidden_weight", "attention_weight"):
            if self.train and getattr(self.train, key):
                raise ValueError(
                    f"train.{key} is {getattr(self.train, key)}: training on a grid matches logits "
                    "alone; set it to 0"
                )
        return self

    @model_validator(mode="after")
    def _check_hqq(self) -> WeightOnlyVariant:
        if self.method == "hqq" and 8 in (self.bits, *(g.bits for g in self.overrides.values())):
            raise ValueError("bits 8: method 'hqq' has 4 bits only; choose rtn or gptq for 8")
        return self


class DynamicVariant(_Section):
    """int8 weights and activations by optimum's ORTQuantizer, ranges found at run time."""

    method: Literal["dynamic"]
    per_channel: bool = True


class StaticVariant(_Section):
    """QDQ int8, activation ranges calibrated on the teacher's answers."""

    method: Literal["static"]
    per_channel: bool = True
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    num_calibration_texts: int = Field(default=16, gt=0)


class HalfVariant(_Section):
    """The float graph in half precision, for CUDA; the head stays in float32."""

    method: Literal["float16", "bfloat16"]


def _method(value: Any) -> Any:
    """Return the tag of the class that describes a variant; pydantic names unknown ones."""
    method = value.get("method", "rtn") if isinstance(value, dict) else getattr(value, "method", "")
    tags = {"hqq": "rtn", "gptq": "rtn", "bfloat16": "float16"}
    return tags.get(method, method) if isinstance(method, str) else ""


VariantConfig = Annotated[
    Annotated[WeightOnlyVariant, Tag("rtn")]
    | Annotated[DynamicVariant, Tag("dynamic")]
    | Annotated[StaticVariant, Tag("static")]
    | Annotated[HalfVariant, Tag("float16")],
    Discriminator(_method),
]


class OnnxConfig(_Section):
    max_model_len: int = Field(default=2048, gt=1, description="positions of the rotary tables")


class EvaluateConfig(_Section):
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


class GatesConfig(_Section):
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


class SelectConfig(_Section):
    """How the default is chosen of variants that passed gates (`export.publish.select`)."""

    rule: Literal["fastest", "lowest_kl", "knee"] = "fastest"
    max_kl_excess: float | None = Field(
        default=None, ge=0, description="over the lowest KL(teacher ‖ variant), nats per token"
    )


class ExportConfig(_Section):
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
    variants: dict[VariantName, VariantConfig] = {
        "int8": WeightOnlyVariant(bits=8, block_size=128),
        "int4": WeightOnlyVariant(bits=4, block_size=32),
    }
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()
    select: SelectConfig = SelectConfig()

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
