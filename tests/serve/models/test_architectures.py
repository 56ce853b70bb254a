"""What a configuration says of a model, and which models are refused by it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from serve.models.architectures import check_supported, head_shape, sliding_windows

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MistralConfig(num_hidden_layers=3, sliding_window=6), (6, 6, 6)),
        (MistralConfig(num_hidden_layers=3, sliding_window=None), (None, None, None)),
        (Qwen2Config(num_hidden_layers=3, **SLIDING), (6, None, 6)),
        (Qwen3Config(num_hidden_layers=3), (None, None, None)),
        (SmolLM3Config(num_hidden_layers=3, pad_token_id=0, **SLIDING), (6, None, 6)),
        (LlamaConfig(num_hidden_layers=2, sliding_window=4), (None, None)),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_sliding_windows_are_those_of_the_layers(
    config: Any, expected: tuple[int | None, ...]
) -> None:
    assert sliding_windows(config) == expected


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        (Qwen2Config, "layer_types", ["chunked_attention"], "'qwen2': layer_types has 'chunked_"),
        (Qwen2Config, "rope_scaling", {"rope_type": "dynamic"}, "rope_scaling is of type 'dyn"),
        (Qwen2Config, "rope_scaling", {"mrope_section": [2, 3, 3]}, "rope_scaling is of type 'mr"),
        (LlamaConfig, "hidden_act", "gelu", "'llama': hidden_act is 'gelu', .* allows 'silu'"),
        (LlamaConfig, "partial_rotary_factor", 0.5, "factor is 0.5, the decoder allows 1.0"),
        (LlamaConfig, "quantization_config", {"bits": 4}, "config is .*, the decoder allows None"),
        (LlamaConfig, "model_type", "gpt2", "'gpt2' is not supported; supported are llama"),
    ],
)
def test_check_supported_refuses_what_the_decoder_would_compute_differently(
    config: Any, key: str, value: Any, message: str
) -> None:
    changed = config()
    setattr(changed, key, value)
    with pytest.raises(ValueError, match=message):
        check_supported(changed)


def test_head_shape_without_a_head_size_divides_the_hidden_size() -> None:
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    shape = head_shape(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 16)
