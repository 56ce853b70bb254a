"""Which variant a bundle serves by default: one of those that passed every gate, by a stated rule.

A variant is a point: seconds per decode step of one sequence, and KL(teacher ‖ variant) in nats
per token; less is better in both. Ties go to the variant that is better in the other one, then to
the name that sorts first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bundle.manifest import Gate, Variant
from export.measure.summary import KL_METRIC, SPEED_METRIC
from export.run.errors import ExportError
from export.run.settings import SelectConfig


class GateError(ExportError):
    """No variant passed its gates, so there is no bundle to serve."""

    exit_code = 3


@dataclass(frozen=True, slots=True, order=True)
class _Point:
    """A variant as it is compared: by speed first, then by quality, then by name."""

    step_s: float
    forward_kl: float
    name: str


def pareto_front(variants: Mapping[str, Variant]) -> list[str]:
    """Return the variants that passed and that no other one beats, fastest first.

    One beats another when it is better in step time or KL and not worse in the other. Of variants
    that are equal in both, all stay.

    Raises:
        ExportError: a variant that passed has no speed or no KL.
    """
    return [point.name for point in _front(_points(variants))]


def choose_default(variants: Mapping[str, Variant], config: SelectConfig) -> str:
    """Return the default by `config.rule`, among those that passed and are not `max_kl_excess`
    above the lowest KL.

    `fastest` and `lowest_kl` say it; `knee` is the point of the front farthest below the chord
    between its fastest and its most accurate point, log step time and KL scaled to 0 to 1 between
    these two (Das 1999, "On characterizing the knee of the Pareto curve based on Normal-Boundary
    Intersection"). A front without a point below its chord gives the fastest.

    Raises:
        GateError: nothing passed; the text names every gate that failed.
        ExportError: as `pareto_front`.
    """
    points = _points(variants)
    if not points:
        raise GateError(f"no variant passed its gates: {_failures(variants)}")
    if config.max_kl_excess is not None:
        limit = min(point.forward_kl for point in points) + config.max_kl_excess
        points = [point for point in points if point.forward_kl <= limit]
    return _RULES[config.rule](points).name


def _points(variants: Mapping[str, Variant]) -> list[_Point]:
    return sorted(_point(name, v) for name, v in variants.items() if v.is_passed)


def _point(name: str, variant: Variant) -> _Point:
    tokens_per_s, forward_kl = (variant.metrics.get(key) for key in (SPEED_METRIC, KL_METRIC))
    if tokens_per_s is None or tokens_per_s <= 0:
        raise ExportError(
            f"variant {name!r} has {SPEED_METRIC} {tokens_per_s}, it must be positive: "
            "measure its speed again"
        )
    if forward_kl is None:
        raise ExportError(f"variant {name!r} has no {KL_METRIC}: evaluate it again")
    return _Point(1 / tokens_per_s, forward_kl, name)


def _front(points: Sequence[_Point]) -> list[_Point]:
    return [point for point in points if not any(_beats(other, point) for other in points)]


def _beats(a: _Point, b: _Point) -> bool:
    is_no_worse = a.step_s <= b.step_s and a.forward_kl <= b.forward_kl
    return is_no_worse and (a.step_s, a.forward_kl) != (b.step_s, b.forward_kl)


def _lowest_kl(points: Sequence[_Point]) -> _Point:
    return min(points, key=lambda point: (point.forward_kl, point))


def _knee(points: Sequence[_Point]) -> _Point:
    front = _front(points)
    fastest, accurate = front[0], front[-1]
    if fastest.step_s == accurate.step_s:
        return fastest

    def depth(point: _Point) -> float:
        """√2 times the distance from the chord, positive on the side of the ideal point."""
        time = math.log(point.step_s / fastest.step_s)
        kl = point.forward_kl - accurate.forward_kl
        scaled_time = time / math.log(accurate.step_s / fastest.step_s)
        scaled_kl = kl / (fastest.forward_kl - accurate.forward_kl)
        return 1 - scaled_time - scaled_kl

    return max(front, key=depth)  # the first, hence fastest, of equals


_RULES: Mapping[str, Callable[[Sequence[_Point]], _Point]] = MappingProxyType(
    {"fastest": min, "lowest_kl": _lowest_kl, "knee": _knee}
)


def _failures(variants: Mapping[str, Variant]) -> str:
    return "; ".join(
        f"{name}: {failure}"
        for name, variant in variants.items()
        for failure in _failed_gates(variant.gates)
    )


def _failed_gates(gates: Sequence[Gate]) -> list[str]:
    if not gates:
        return ["nothing was measured"]
    return [
        f"{gate.name} {'nan' if gate.measured is None else gate.measured} "
        f"exceeds {gate.threshold} {gate.unit}"
        for gate in gates
        if not gate.passed
    ]
