"""Rotary embeddings in both spellings of a configuration, read as the older one.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`, which
may hold one object per type of layer. Read by the other version, a new file silently turns with the
class's default base and no scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")

_POSITIVE = "a number above 0"
# What each type of scaling reads, and whether it must be there. The others (dynamic, longrope)
# turn by the longest sequence of the batch.
_KEYS: Mapping[str, Mapping[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": True,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}
ROPE_TYPES = tuple(_KEYS)


@dataclass(frozen=True, slots=True)
class Rope:
    """A base, and how it is scaled: `scaling` has `rope_type` and its parameters, None: not."""

    theta: float
    scaling: Mapping[str, Any] | None


def read_rope(config: Mapping[str, Any], default_theta: float) -> Rope:
    """Return what a configuration says, in whichever spelling.

    ValueError where the two spellings contradict each other, where types of layers turn
    differently, and for a type of scaling or a parameter that is not supported.
    """
    theta = config.get("rope_theta")
    if theta is not None and not _is_positive(theta):
        raise ValueError(f"rope_theta is {theta!r}, allowed is {_POSITIVE}")
    found: list[tuple[str, Rope]] = []
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None:
            found.append((key, _read_parameters(config, key, theta or default_theta)))
    for key, rope in found:
        if theta is not None and rope.theta != theta:
            raise ValueError(f"rope_theta is {theta!r}, {key} has {rope.theta!r}")
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise ValueError("rope_parameters and rope_scaling contradict each other")
    return found[0][1] if found else Rope(theta or default_theta, None)


def _read_parameters(config: Mapping[str, Any], key: str, theta: float) -> Rope:
    value = config[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, allowed is an object")
    if not value.keys() & set(LAYER_TYPES):
        return _read_flat(value, key, theta)
    if other := sorted(value.keys() - set(LAYER_TYPES)):
        raise ValueError(f"{key} has {other[0]!r} beside {', '.join(LAYER_TYPES)}")
    layers = config.get("layer_types")
    used = set(layers) if isinstance(layers, list) and layers else value.keys()
    ropes = []
    for layer in sorted(used & value.keys()):
        if not isinstance(value[layer], dict):
            raise ValueError(f"{key}.{layer} is {value[layer]!r}, allowed is an object")
        ropes.append(_read_flat(value[layer], f"{key}.{layer}", theta))
    if not ropes or any(rope != ropes[0] for rope in ropes):
        raise ValueError(f"{key} differs between types of layers, which is not supported")
    return ropes[0]


def _read_flat(value: Mapping[str, Any], key: str, theta: float) -> Rope:
    parameters = {name: item for name, item in value.items() if item is not None}
    theta = parameters.pop("rope_theta", theta)
    partial = parameters.pop("partial_rotary_factor", 1.0)
    rope_type = parameters.pop("rope_type", None)
    older = parameters.pop("type", None)
    if not _is_positive(theta):
        raise ValueError(f"{key}.rope_theta is {theta!r}, allowed is {_POSITIVE}")
    if partial != 1.0:
        raise ValueError(f"{key}.partial_rotary_factor is {partial!r}, the decoder allows 1.0")
    if None not in (rope_type, older) and rope_type != older:
        raise ValueError(f"{key}.rope_type is {rope_type!r}, {key}.type is {older!r}")
    rope_type = rope_type or older or "default"
    if "mrope_section" in parameters:
        rope_type = "mrope"
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise ValueError(f"{key} is of type {rope_type!r}; supported are {', '.join(ROPE_TYPES)}")
    _check_parameters(parameters, key, rope_type)
    return Rope(theta, {"rope_type": rope_type, **parameters} if parameters else None)


def _check_parameters(parameters: Mapping[str, Any], key: str, rope_type: str) -> None:
    known = _KEYS[rope_type]
    for name, is_required in known.items():
        if is_required and name not in parameters:
            raise ValueError(f"{key} of type {rope_type!r} lacks {name}")
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{key} of type {rope_type!r} has {name!r}, which is not supported")
        is_right: Callable[[Any], bool] = _is_flag if name == "truncate" else _is_positive
        if not is_right(value):
            allowed = "true or false" if name == "truncate" else _POSITIVE
            raise ValueError(f"{key}.{name} is {value!r}, allowed is {allowed}")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18
