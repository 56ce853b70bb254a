"""`summary.md`: what a run found, in a page of text. What spoils it comes first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loadtest.analysis.summary import ArmComparison, Cell, Summary
from report.formats import (
    NOT_MEASURED,
    show_estimate,
    show_number,
    show_percent_estimate,
    show_points,
    show_ratio,
    show_time,
    show_time_estimate,
)

_PERCENTILES = ("p50", "p90", "p95", "p99")
_OUTCOMES = {
    "error": "errors",
    "rejected": "rejections",
    "deadline": "deadlines exceeded",
    "cancelled": "cancellations",
}


def to_markdown(summary: Summary) -> str:
    """Return the page; INVALID runs and runs with failures say so in its first lines."""
    is_closed = summary.config.get("arrival") == "closed"
    lines = [*_warnings(summary), "# Load test", ""]
    lines += [f"Schedule {summary.schedule_sha256}. In brackets: 95 % intervals.", ""]
    for comparison in summary.comparisons:
        lines += [*describe_comparison(comparison, is_closed), ""]
    lines += ["## Latency", "", *_latency_table(summary), ""]
    lines += ["## Load and quality", "", *_load_table(summary), ""]
    return "\n".join(lines).rstrip() + "\n"


def _warnings(summary: Summary) -> Iterator[str]:
    if not summary.validity.is_valid:
        yield f"**INVALID**: {'; '.join(summary.validity.problems)}."
        yield ""
    failures = describe_failures(summary)
    if failures:
        yield f"**{failures}.**"
        yield ""
    for note in summary.notes:
        yield f"**{note}.**"
        yield ""


def describe_failures(summary: Summary) -> str:
    """Return how many measured requests failed, each kind apart; "" when none did.

    Those that an interrupted run gave up itself are none of them.
    """
    counts = dict.fromkeys(_OUTCOMES, 0)
    if summary.is_interrupted:
        del counts["cancelled"]
    for cell in summary.cells:
        for outcome in counts:
            counts[outcome] += cell.outcomes.get(outcome, 0)
    if not any(counts.values()):
        return ""
    kinds = ", ".join(f"{count} {_OUTCOMES[name]}" for name, count in counts.items() if count)
    return f"{sum(counts.values())} of {summary.num_offered} requests failed: {kinds}"


def describe_excess(summary: Summary) -> str:
    """Return that more requests failed than the run was told are allowed; "" where that is not."""
    allowed = summary.config.get("max_failure_rate", 0.0)
    assert isinstance(allowed, int | float)
    if summary.num_failed <= allowed * summary.num_offered:
        return ""
    return f"{describe_failures(summary)}; --max-failure-rate {allowed:g} allows fewer"


def describe_comparison(found: ArmComparison, is_closed: bool) -> Iterator[str]:
    """Yield the lines of one comparison, its heading first."""
    a, b = found.arm_a, found.arm_b
    load = (
        f"concurrency {found.load:g} (closed loop)" if is_closed else f"{found.load:g} requests/s"
    )
    yield f"## {a} against {b} at {load}"
    yield ""
    yield f"{found.num_pairs} pairs of requests."
    yield ""
    for name, ratio in found.ratios.items():
        yield f"* {name}: {a} is {show_ratio(ratio)} as fast"
    for name, difference in found.differences.items():
        yield f"* {name}: {a} − {b} = {show_points(difference)}"
    if found.mcnemar_p is not None:
        yield f"* McNemar's p of the correctness: {found.mcnemar_p:.3g}"
    if found.agreement is not None:
        yield f"* agreement of the majorities: {show_percent_estimate(found.agreement)}"


def _latency_table(summary: Summary) -> Iterator[str]:
    yield from _row("arm", "load", "latency", "count", "mean", *_PERCENTILES)
    yield from _row(*["---"] * 9)
    for cell in summary.cells:
        for name in ("ttft", "itl", "tpot", "e2e"):
            found = getattr(cell, name)
            values = [show_time_estimate(getattr(found, each)) for each in _PERCENTILES]
            yield from _row(
                cell.arm, f"{cell.load:g}", name, found.count, show_time(found.mean), *values
            )


def _load_table(summary: Summary) -> Iterator[str]:
    ks = sorted({k for c in summary.cells if c.quality for k in c.quality.pass_at_k})
    quality = [*(f"pass@{k}" for k in ks), "maj@n", "k3", "exact KL"]
    header = ["arm", "load", "offered", "ok", "req/s", "tokens/s", "goodput", *quality]
    yield from _row(*header)
    yield from _row(*["---"] * len(header))
    for cell in summary.cells:
        yield from _row(
            cell.arm, f"{cell.load:g}", cell.num_offered, cell.outcomes.get("ok", 0),
            show_number(cell.throughput_rps), show_number(cell.output_tokens_per_s),
            show_percent_estimate(cell.goodput), *_quality(cell, ks),
        )  # fmt: skip


def _quality(cell: Cell, ks: Iterable[int]) -> Iterator[str]:
    found = cell.quality
    for k in ks:
        yield show_percent_estimate(found.pass_at_k.get(k) if found else None)
    yield show_percent_estimate(found.majority_correct if found else None)
    yield show_estimate(found.k3 if found else None)
    yield show_estimate(found.exact_kl if found else None)


def _row(*cells: object) -> Iterator[str]:
    shown = ("–" if cell == NOT_MEASURED else str(cell) for cell in cells)
    yield f"| {' | '.join(shown)} |"
