"""Rotary embeddings in both spellings."""

from __future__ import annotations

from typing import Any

import pytest

from bundle.rope import Rope, read_rope

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FULL = {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Rope(1e4, None)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5, None)),
        ({"rope_parameters": FULL}, Rope(5e5, None)),
        ({"rope_theta": None, "rope_parameters": FULL}, Rope(5e5, None)),
        ({"rope_theta": 5e5, "rope_parameters": FULL}, Rope(5e5, None)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, Rope(5e5, None)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            Rope(5e5, {"rope_type": "llama3", **LLAMA3}),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            Rope(5e5, {"rope_type": "llama3", **LLAMA3}),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            Rope(1e4, {"rope_type": "linear", "factor": 2.0}),
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0}},
            Rope(1e4, {"rope_type": "yarn", "factor": 4.0}),
        ),
        ({"rope_parameters": {"full_attention": FULL}}, Rope(5e5, None)),
        (
            {"rope_parameters": {"full_attention": FULL, "sliding_attention": FULL}},
            Rope(5e5, None),
        ),
        (
            {
                "layer_types": ["full_attention"],
                "rope_parameters": {"full_attention": FULL, "sliding_attention": None},
            },
            Rope(5e5, None),
        ),
    ],
)
def test_both_spellings_say_the_same(config: dict[str, Any], expected: Rope) -> None:
    assert read_rope(config, 1e4) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": FULL}, "rope_theta is 10000.0, rope_parameters"),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2},
             "rope_parameters": FULL},
            "contradict each other",
        ),
        (
            {"rope_parameters": {"full_attention": FULL, "sliding_attention": {"rope_theta": 1e4}}},
            "differs between types of layers",
        ),
        ({"rope_parameters": {"full_attention": FULL, "rope_theta": 1e4}}, "'rope_theta' beside"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "is of type 'dynamic'; supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "is of type 'mrope'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_scaling.type is"),
        ({"rope_scaling": {"type": ["linear"]}}, r"is of type \['linear'\]"),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1, allowed is"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "has 'x', which is not supp"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', allowed is an object"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', allowed is a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": 1}}, "full_attention is 1, allowed is an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_turned_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rope(config, 1e4)
