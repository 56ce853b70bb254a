"""Which decoders `export.graph.trace` computes exactly, and how many nodes each takes."""

from __future__ import annotations

from typing import Any

from export.run.errors import ExportError
from serve.models.architectures import check_supported

_NODES_PER_LAYER = 11
_OTHER_NODES = 11
# Split, Reshape, norm, Reshape, Concat: GroupQueryAttention has its own, but not on the CPU.
_NODES_PER_QK_NORM = 5
# GroupQueryAttention's rotary embedding works on vectors of 8.
_HEAD_DIM_MULTIPLE = 16
# What the graph would leave out or get wrong: key -> the values for which it does not matter.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def check_exportable(config: Any) -> None:
    """Raise ExportError, naming model type and key, where the graph would compute another model."""
    try:
        check_supported(config)
    except ValueError as error:
        raise ExportError(f"{error}; an ONNX graph of it would be wrong") from None
    for key, allowed in _ALLOWED.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise _refusal(config.model_type, key, value, " or ".join(map(repr, allowed)))
    check_head_dim(config.model_type, head_size(config))


def check_head_dim(model_type: str, head_dim: int) -> None:
    """Raise ExportError for a size of heads that the graph's attention does not compute."""
    if head_dim % _HEAD_DIM_MULTIPLE:
        raise _refusal(model_type, "head_dim", head_dim, f"multiples of {_HEAD_DIM_MULTIPLE}")


def head_size(config: Any) -> int:
    """Return the size of an attention head, given or derived."""
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def expected_num_nodes(model: Any) -> int:
    """Return how many nodes the finished graph of a transformers model has.

    11 per layer, one more for each bias (Q, K and V share one), 5 more where the heads of Q and K
    are normalized, and 11 others.
    """
    has_qk_norm: bool = model.config.model_type == "qwen3"
    per_layer = _NODES_PER_LAYER + _NODES_PER_QK_NORM * has_qk_norm
    return _OTHER_NODES + sum(per_layer + _num_biases(layer) for layer in model.model.layers)


def _num_biases(layer: Any) -> int:
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return sum(linear.bias is not None for linear in linears)


def _refusal(model_type: str, key: str, value: Any, allowed: str) -> ExportError:
    return ExportError(
        f"model type {model_type!r}: {key} is {value!r}, the ONNX graph allows {allowed}"
    )
