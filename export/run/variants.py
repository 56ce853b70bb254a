"""The settings of variants: how each graph of the student is quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from export.run.training import PhaseConfig, Section

FLOAT_VARIANT = "fp32"


class GridConfig(Section):
    """Integer codes of `bits`, `block_size` of them to a scale."""

    bits: Literal[4, 8] = Field(description="Bits of a weight.")
    block_size: Literal[16, 32, 64, 128, 256] = Field(description="Weights that share a scale.")


LinearName = Literal["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class WeightOnlyVariant(GridConfig):
    """MatMulNBits: blocks of integer weights that share a scale (`export.graph.quantize`)."""

    method: Literal["rtn", "hqq", "gptq"] = Field(
        default="rtn",
        description="How weights are rounded: to nearest, by HQQ, or by GPTQ on training texts.",
    )
    overrides: dict[LinearName, GridConfig] = Field(
        default={}, description="Another grid for some linear layers, by name."
    )
    accuracy_level: int = Field(
        default=4,
        ge=0,
        le=4,
        description="What the kernel computes in, as onnxruntime counts it; 4 is int8 activations.",
    )
    symmetric: bool = Field(default=True, description="Whether a block has no zero point.")
    num_calibration_texts: int = Field(
        default=64, gt=0, description="Training texts that GPTQ reads."
    )
    train: PhaseConfig | None = Field(
        default=None,
        description="A phase of quantization-aware training, with the float student as teacher.",
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


class DynamicVariant(Section):
    """int8 weights and activations by optimum's ORTQuantizer, ranges found at run time."""

    method: Literal["dynamic"] = Field(
        description="int8 by optimum's ORTQuantizer, ranges found at run time."
    )
    per_channel: bool = Field(
        default=True, description="Whether each output channel has a scale of its own."
    )


class StaticVariant(Section):
    """QDQ int8, activation ranges calibrated on the teacher's answers."""

    method: Literal["static"] = Field(description="int8 with ranges calibrated on training texts.")
    per_channel: bool = Field(
        default=True, description="Whether each output channel has a scale of its own."
    )
    calibration: Literal["minmax", "entropy", "percentile"] = Field(
        default="minmax", description="How the range of activations is chosen."
    )
    num_calibration_texts: int = Field(
        default=16, gt=0, description="Training texts that the calibration reads."
    )


class HalfVariant(Section):
    """The float graph in half precision, for CUDA; the head stays in float32."""

    method: Literal["float16", "bfloat16"] = Field(
        description="The half precision of weights and activations; the head stays in float32."
    )


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
