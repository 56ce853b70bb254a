"""Which architectures the decoder computes, and what their configurations say of it.

Reads the configuration of a transformers model; needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bundle.config_keys import SUPPORTED_MODEL_TYPES
from bundle.rope import LAYER_TYPES, ROPE_TYPES

# What `serve.models.llama` would compute differently: key -> the values that it computes.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How a packed projection divides into heads: queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_rotated(self) -> int:
        """Queries and keys."""
        return self.num_heads + self.num_kv_heads

    @property
    def num_queries_per_key(self) -> int:
        return self.num_heads // self.num_kv_heads


def head_shape(config: Any) -> HeadShape:
    """Return how many heads a model has, and of which size."""
    head_dim = getattr(config, "head_dim", None)
    return HeadShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
    )


def check_supported(config: Any) -> None:
    """Raise ValueError unless a row's logits depend on its own tokens and positions alone."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    other = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if other:
        raise ValueError(
            f"model type {config.model_type!r}: layer_types has {min(other)!r}; "
            f"supported are {', '.join(LAYER_TYPES)}"
        )
    for key, allowed in _ALLOWED.items():
        value = getattr(config, key, None)
        if value not in allowed:
            raise ValueError(
                f"model type {config.model_type!r}: {key} is {value!r}, "
                f"the decoder allows {allowed[-1]!r}"
            )
    scaling = getattr(config, "rope_scaling", None) or {}
    rope_type = "mrope" if "mrope_section" in scaling else scaling.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"model type {config.model_type!r}: rope_scaling is of type {rope_type!r}; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Return how many keys a token sees in each layer, its own included; None: all.

    As transformers' masks have it: Mistral's window holds for all layers, the others' for those
    that `layer_types` names.
    """
    num_layers: int = config.num_hidden_layers
    if config.model_type == "mistral":
        is_sliding = [True] * num_layers
    else:
        layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
        is_sliding = [layer_type == "sliding_attention" for layer_type in layer_types]
    return tuple(config.sliding_window if sliding else None for sliding in is_sliding)
