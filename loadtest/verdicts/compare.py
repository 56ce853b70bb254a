"""Two runs side by side: what got faster or better from the first to the second.

Runs of one schedule are compared request by request; of others only their numbers are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from bundle.errors import UserError
from estimators.estimate import Estimate
from loadtest.analysis.analysis import compare_arms
from loadtest.analysis.metrics import metrics_of
from loadtest.analysis.summary import ArmComparison, Summary, read_summary
from loadtest.client.requests_file import REQUESTS_FILE, read_requests
from loadtest.config import RunConfig
from loadtest.records import Phase, RequestRecord
from loadtest.report.summary_text import describe_comparison, describe_failures
from loadtest.verdicts.gate import regression
from report.formats import show_estimate

# Settings that make numbers incomparable. The seed only makes runs unpaired.
_SETTINGS = (
    "arms", "dataset", "max_prompts", "num_samples", "max_tokens", "temperature", "arrival",
    "rates_rps", "concurrency", "trace", "duration_s", "block_s", "gap_s", "slo", "timeout_s",
)  # fmt: skip


class NotComparableError(UserError):
    """Two runs were asked different things."""


@dataclass(frozen=True, slots=True)
class MetricChange:
    """One number of both runs. `worse_share` as `gate.regression`: below 0 it got better."""

    arm: str
    load: float
    metric: str
    before: Estimate
    after: Estimate
    worse_share: float | None


@dataclass(frozen=True, slots=True)
class RunComparison:
    """`pairs` has the second run as its first arm; empty unless both have one schedule.

    `differing` says which settings differ, where the comparison was forced; `warnings` what makes
    either run doubtful.
    """

    before: str
    after: str
    is_closed: bool
    warnings: tuple[str, ...]
    differing: tuple[str, ...]
    changes: tuple[MetricChange, ...]
    pairs: tuple[ArmComparison, ...]


def compare_runs(before: Path, after: Path, *, is_forced: bool = False) -> RunComparison:
    """Compare two runs by their folders.

    Raises:
        NotComparableError: settings differ and it was not forced; says which.
        UserError: an artifact is missing or broken.
    """
    first, second = read_summary(before), read_summary(after)
    differing = tuple(_differences(first, second))
    if differing and not is_forced:
        raise NotComparableError(
            f"{before} and {after} cannot be compared: {'; '.join(differing)}; --force does it"
        )
    is_paired = first.schedule_sha256 == second.schedule_sha256
    return RunComparison(
        before=str(before),
        after=str(after),
        is_closed=second.config.get("arrival") == "closed",
        warnings=(*_warnings(str(before), first), *_warnings(str(after), second)),
        differing=differing,
        changes=tuple(_changes(first, second)),
        pairs=tuple(_pairs(before, after, second)) if is_paired else (),
    )


def to_json(comparison: RunComparison) -> str:
    return TypeAdapter(RunComparison).dump_json(comparison).decode()


def to_text(comparison: RunComparison) -> str:
    """Return warnings, what the pairs say, and a table of all numbers."""
    lines = [f"**{each}**" for each in comparison.warnings]
    lines += [f"differs: {each}" for each in comparison.differing]
    lines += [f"before: {comparison.before}", f"after: {comparison.after}", ""]
    for each in comparison.pairs:
        lines += [*describe_comparison(each, comparison.is_closed), ""]
    if not comparison.pairs:
        lines += ["Not the same requests: the intervals of before and after are unpaired.", ""]
    lines += ["| arm | load | metric | before | after | |", f"|{' --- |' * 6}"]
    lines += [_row(change) for change in comparison.changes]
    return "\n".join(lines) + "\n"


def _differences(first: Summary, second: Summary) -> Iterator[str]:
    if first.schedule_sha256 != second.schedule_sha256:
        found = list(_setting_differences(first, second, (*_SETTINGS, "seed", "warmup_s")))
        if not found:
            yield "the same settings sent other requests: the dataset's contents have changed"
    yield from _setting_differences(first, second, _SETTINGS)


def _setting_differences(first: Summary, second: Summary, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        one, other = first.config.get(name), second.config.get(name)
        if one != other:
            yield f"{name} is {one} and {other}"


def _warnings(name: str, summary: Summary) -> Iterator[str]:
    if not summary.validity.is_valid:
        yield f"{name} is INVALID: {'; '.join(summary.validity.problems)}"
    failures = describe_failures(summary)
    if failures:
        yield f"{name}: {failures}"
    for note in summary.notes:
        yield f"{name}: {note}"


def _changes(first: Summary, second: Summary) -> Iterator[MetricChange]:
    """Yield what both runs have measured."""
    known = metrics_of(first)
    for (arm, load), found in metrics_of(second).items():
        for metric, after in found.items():
            before = known.get((arm, load), {}).get(metric)
            if before is None or after is None:
                continue
            # No share can be taken of nothing.
            worse = regression(metric, before.value, after.value) if before.value else None
            yield MetricChange(arm, load, metric, before, after, worse)


def _pairs(before: Path, after: Path, summary: Summary) -> Iterator[ArmComparison]:
    config = RunConfig.model_validate(summary.config)
    earlier, later = (read_requests(folder / REQUESTS_FILE) for folder in (before, after))
    for cell in summary.cells:
        found = compare_arms(
            config, _of(later, cell.arm, cell.load), _of(earlier, cell.arm, cell.load)
        )
        if found is not None:
            yield dataclasses.replace(found, arm_a=f"{cell.arm} after", arm_b=f"{cell.arm} before")


def _of(records: list[RequestRecord], arm: str, load: float) -> list[RequestRecord]:
    return [
        record
        for record in records
        if (record.plan.arm, record.plan.load, record.plan.phase) == (arm, load, Phase.MEASURED)
    ]


def _row(change: MetricChange) -> str:
    worse = change.worse_share
    verdict = "" if not worse else f"{abs(worse):.1%} {'worse' if worse > 0 else 'better'}"
    values = f"{show_estimate(change.before)} | {show_estimate(change.after)}"
    return f"| {change.arm} | {change.load:g} | {change.metric} | {values} | {verdict} |"
