"""The settings of variants: how each graph of the student is quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from export.run.training import PhaseConfig, Section

FLOAT_VARIANT = "fp32"


class GridConfig(Section):
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


class DynamicVariant(Section):
    """int8 weights and activations by optimum's ORTQuantizer, ranges found at run time."""

    method: Literal["dynamic"]
    per_channel: bool = True


class StaticVariant(Section):
    """QDQ int8, activation ranges calibrated on the teacher's answers."""

    method: Literal["static"]
    per_channel: bool = True
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    num_calibration_texts: int = Field(default=16, gt=0)


class HalfVariant(Section):
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
