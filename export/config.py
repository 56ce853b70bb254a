"""What an export run is told: strict YAML. Unknown keys and values out of bounds fail by name.

Each stage's section is all that the stage depends on besides the stages before it: a changed
option reruns that stage and what follows, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bundle.errors import UserError
from bundle.manifest import VariantName

FLOAT_VARIANT = "fp32"


class ExportError(UserError):
    """An export cannot go on; the text says why and what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TasksConfig(_Section):
    """Which prompts: the built-in set, cut to so many of each split."""

    seed: int = 0
    max_train: int = Field(default=1000, gt=0)
    max_test: int = Field(default=48, gt=0)


class SampleConfig(_Section):
    """How the teacher answers: one completion per prompt, `max_num_seqs` at a time."""

    temperature: float = Field(default=0.8, ge=0)
    max_tokens: int = Field(default=96, gt=0)
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_num_seqs: int = Field(default=64, gt=0)
    max_model_len: int = Field(default=1024, gt=1)


class PruneConfig(_Section):
    """How many layers to drop, and how hard to look for those that matter least."""

    num_removed_layers: int = Field(default=4, ge=0)
    first_candidate: int = Field(default=1, ge=0, description="layers below it are kept")
    num_candidates: int = Field(default=6, gt=0, description="tried after the first round")
    num_texts: int = Field(default=8, gt=0)


class DistillConfig(_Section):
    """Loss α·T²·KL + (1 − α)·CE, and the optimizer's settings (`export.distill`)."""

    num_epochs: int = Field(default=1, gt=0)
    alpha: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    tokens_per_step: int = Field(default=1024, gt=0)
    tokens_per_micro_batch: int = Field(default=2048, gt=0)
    freeze_shared_layers: bool = Field(
        default=False,
        description="keep the embedding, the head and the layers below the first removed one as "
        "the teacher has them; they then run once for both models",
    )
    seed: int = 0


class VariantConfig(_Section):
    """A weight-only quantized graph (`export.quantize`)."""

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128, 256]
    accuracy_level: int = Field(default=4, ge=0, le=4)


class OnnxConfig(_Section):
    max_model_len: int = Field(default=2048, gt=1, description="positions of the rotary tables")


class EvaluateConfig(_Section):
    """The measurements: held-out prompts, and tokens per timed decode."""

    max_num_seqs: int = Field(default=16, gt=0)
    num_timed_tokens: int = Field(default=48, gt=1)
    num_rounds: int = Field(default=3, gt=0)


class GatesConfig(_Section):
    """The largest mean KL, in nats per token, that each hop may cost."""

    onnx_kl: float = Field(default=1e-6, ge=0)
    quantized_kl: float = Field(default=0.02, ge=0)
    student_kl: float = Field(default=0.40, ge=0, description="KL(teacher ‖ student), held out")


class ExportConfig(_Section):
    """A whole run. `teacher` takes what `export.teacher.resolve_teacher` takes."""

    teacher: str
    output_dir: Path
    cache_dir: Path = Path("runs/cache")
    tasks: TasksConfig = TasksConfig()
    sample: SampleConfig = SampleConfig()
    prune: PruneConfig = PruneConfig()
    distill: DistillConfig = DistillConfig()
    onnx: OnnxConfig = OnnxConfig()
    variants: dict[VariantName, VariantConfig] = {
        "int8": VariantConfig(bits=8, block_size=128),
        "int4": VariantConfig(bits=4, block_size=32),
    }
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()

    @model_validator(mode="after")
    def _check_variants(self) -> ExportConfig:
        if FLOAT_VARIANT in self.variants:
            raise ValueError(f"variants: {FLOAT_VARIANT!r} is always exported; leave it out")
        return self

    @model_validator(mode="after")
    def _check_num_texts(self) -> ExportConfig:
        if self.prune.num_texts > self.tasks.max_train:
            raise ValueError(
                f"prune.num_texts {self.prune.num_texts} exceeds tasks.max_train "
                f"{self.tasks.max_train}, from which the texts are drawn"
            )
        return self


def load_config(path: Path) -> ExportConfig:
    """Read a recipe. ExportError names the first key that is wrong, or what YAML cannot parse."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is not YAML: {error}") from None
    try:
        return ExportConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ExportError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from None
