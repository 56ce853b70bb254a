"""The numbers of a summary by name, as limits and comparisons of runs call them.

`student.ttft_p95` is that of the arm at every load, `student@2.ttft_p95` at load 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from estimators.estimate import Estimate
from loadtest.analysis.summary import ArmComparison, Cell, Distribution, Quality, Summary

LATENCIES = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = ("p50", "p90", "p95", "p99")
RATIOS = (
    ("ttft", 50), ("ttft", 95), ("itl", 50), ("itl", 95), ("tpot", 50), ("e2e", 50), ("e2e", 95),
)  # fmt: skip
"""The latencies and percentiles by which two arms are compared."""

Place = tuple[str, float]
"""An arm and a load."""

_RATES = ("throughput_rps", "output_tokens_per_s", "goodput", "failed_share")
_QUALITIES = ("majority", "k3", "exact_kl", "agreement", "difference_majority")
_PASS_AT_K = re.compile(r"(difference_)?pass@[1-9][0-9]*")
_HIGHER_IS_BETTER = ("throughput_rps", "output_tokens_per_s", "goodput", "majority", "agreement")
_NAMES = (
    *(f"{latency}_{percentile}" for latency in LATENCIES for percentile in PERCENTILES),
    *_RATES,
    *_QUALITIES,
    *(f"speedup_{latency}_p{percent}" for latency, percent in RATIOS),
    "speedup_output_tokens_per_s",
)


def is_higher_better(metric: str) -> bool:
    """Return whether more of a metric is better, as of pass@k, speed-ups and goodput."""
    return metric in _HIGHER_IS_BETTER or metric.startswith(("pass@", "speedup_", "difference_"))


def is_known(metric: str) -> bool:
    """Return whether a run can have such a metric, measured or not."""
    return metric in _NAMES or _PASS_AT_K.fullmatch(metric) is not None


def known_names() -> str:
    return ", ".join([*_NAMES, "pass@K", "difference_pass@K"])


def metrics_of(summary: Summary) -> dict[Place, dict[str, Estimate | None]]:
    """Return what every arm was found to have at every load; missing or None: too little data.

    `speedup_*`, `difference_*` and `agreement` are those of a comparison's first arm; where it was
    compared with several others, its worst.
    """
    found: dict[Place, dict[str, Estimate | None]] = {
        (cell.arm, cell.load): dict(_of_cell(cell)) for cell in summary.cells
    }
    for comparison in summary.comparisons:
        of_arm = found[comparison.arm_a, comparison.load]
        for name, estimate in _of_comparison(comparison):
            known = of_arm.get(name)
            if known is None or (estimate is not None and estimate.value < known.value):
                of_arm[name] = estimate
    return found


def _of_cell(cell: Cell) -> Iterator[tuple[str, Estimate | None]]:
    for latency in LATENCIES:
        distribution: Distribution = getattr(cell, latency)
        for percentile in PERCENTILES:
            yield f"{latency}_{percentile}", getattr(distribution, percentile)
    yield "throughput_rps", _plain(cell.throughput_rps, cell)
    yield "output_tokens_per_s", _plain(cell.output_tokens_per_s, cell)
    yield "goodput", cell.goodput
    num_failed = cell.num_offered - cell.outcomes.get("ok", 0)
    yield "failed_share", _plain(num_failed / cell.num_offered, cell) if cell.num_offered else None
    yield from _of_quality(cell.quality)


def _of_quality(quality: Quality | None) -> Iterator[tuple[str, Estimate | None]]:
    if quality is None:
        return
    yield "majority", quality.majority_correct
    yield "k3", quality.k3
    yield "exact_kl", quality.exact_kl
    for k, estimate in quality.pass_at_k.items():
        yield f"pass@{k}", estimate


def _of_comparison(comparison: ArmComparison) -> Iterator[tuple[str, Estimate | None]]:
    for name, estimate in comparison.ratios.items():
        yield f"speedup_{name}", estimate
    for name, estimate in comparison.differences.items():
        yield f"difference_{name}", estimate
    yield "agreement", comparison.agreement


def _plain(value: float, cell: Cell) -> Estimate:
    return Estimate(value, None, None, cell.num_offered)
