"""The settings of training: phases, each with its text, its loss and its optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LossConfig(Section):
    """α·T²·D(teacher_T, student_T) + (1 − α)·CE, plus matching terms (`export.student.losses`)."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="The divergence D between teacher and student."
    )
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="The weight of the teacher in divergence jsd."
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The weight of the divergence; 0 is plain fine-tuning on the text.",
    )
    temperature: float = Field(
        default=2.0, gt=0, description="The temperature T of both distributions."
    )
    hidden_weight: float = Field(
        default=0.0,
        ge=0,
        description="The weight of hidden-state matching, a relative squared error.",
    )
    attention_weight: float = Field(
        default=0.0, ge=0, description="The weight of attention-map matching, in nats."
    )


class PhaseConfig(LossConfig):
    """One phase of training: whose text, which loss, which optimizer settings."""

    data: Literal["teacher", "student"] = Field(
        default="teacher", description="Whose completions are trained on; student is on-policy."
    )
    teacher_logits: Literal["live", "cache"] = Field(
        default="live",
        description="Whether the teacher runs beside the student or its logits are read from the "
        "cache.",
    )
    num_epochs: int = Field(default=1, gt=0, description="How often the prompts are gone through.")
    learning_rate: float = Field(
        default=3e-4, gt=0, description="The highest learning rate of AdamW."
    )
    warmup_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="The share of the phase over which the learning rate rises.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="The norm to which gradients are clipped."
    )
    tokens_per_step: int = Field(
        default=1024, gt=0, description="Completion tokens of an optimizer step, at least."
    )
    tokens_per_micro_batch: int = Field(
        default=2048, gt=0, description="The most tokens of a micro-batch, padding included."
    )
    num_prompts_per_round: int = Field(
        default=64,
        gt=0,
        description="Prompts that the student answers between two updates of on-policy text.",
    )
    seed: int = Field(
        default=0, description="The seed of the order of texts, and of the draws of on-policy text."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> PhaseConfig:
        if self.data == "student" and self.teacher_logits == "cache":
            raise ValueError("teacher_logits 'cache' has no logits of what the student samples")
        if self.teacher_logits == "cache" and (self.hidden_weight or self.attention_weight):
            raise ValueError("teacher_logits 'cache' has neither hidden states nor attention maps")
        return self


class DistillConfig(Section):
    """The phases of training, one after the other."""

    phases: tuple[PhaseConfig, ...] = Field(
        default=(PhaseConfig(),),
        min_length=1,
        description="The phases of training, in their order.",
    )
    freeze_shared_layers: bool = Field(
        default=False,
        description="Whether the embedding, the head and the layers below the first removed one "
        "stay as the teacher has them; they then run once for both models.",
    )
    checkpoint_every_s: float = Field(
        default=120.0, gt=0, description="Seconds between checkpoints."
    )
