"""The settings of training: phases, each with its text, its loss and its optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LossConfig(Section):
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


class DistillConfig(Section):
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
