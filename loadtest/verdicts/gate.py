"""Limits that a run has to keep, for pipelines: which of them broke, a line each.

A limit is held against the value itself, not the end of its interval: at the edge, how many
requests a run has would otherwise decide. A run that is INVALID, or of which more failed than its
--max-failure-rate allows, breaks every gate; a limit on `failed_share` goes before that rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bundle.errors import UserError
from estimators.estimate import Estimate
from loadtest.analysis.metrics import Place, is_higher_better, is_known, known_names, metrics_of
from loadtest.analysis.summary import Summary
from loadtest.report.summary_text import describe_excess

Kind = Literal["min", "max", "max-regress"]
Metrics = Mapping[Place, Mapping[str, Estimate | None]]

_LIMIT = re.compile(
    r"(?P<arm>[^@=]+?)(@(?P<load>[0-9.]+))?\.(?P<metric>[A-Za-z][^.=]*)=(?P<bound>[^=]+)"
)


class LimitError(UserError):
    """A limit is not written as one, or names what the run does not have."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Limit:
    """`load` None: at every load. A regression's bound is a share: 0.1 is 10 % worse."""

    kind: Kind
    arm: str
    load: float | None
    metric: str
    bound: float

    def __str__(self) -> str:
        at = "" if self.load is None else f"@{self.load:g}"
        return f"--{self.kind} {self.arm}{at}.{self.metric}={self.bound:g}"


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a gate is shut. `limit` and `load` None: the run as a whole cannot be believed."""

    limit: Limit | None
    load: float | None
    reason: str

    def __str__(self) -> str:
        at = "" if self.load is None else f" at load {self.load:g}"
        return self.reason if self.limit is None else f"{self.limit}: {self.reason}{at}"


def parse_limit(kind: Kind, text: str) -> Limit:
    """Return a limit such as `student.pass@1=0.2` or `student@2.ttft_p95=0.3`; LimitError.

    >>> str(parse_limit("max", "student@2.ttft_p95=0.3"))
    '--max student@2.ttft_p95=0.3'
    """
    match = _LIMIT.fullmatch(text.strip())
    bound = _number(match["bound"]) if match else None
    load = _number(match["load"]) if match and match["load"] else None
    if match is None or bound is None or (match["load"] and load is None):
        raise LimitError(
            f"--{kind} {text!r}: write ARM.METRIC=NUMBER, or ARM@LOAD.METRIC=NUMBER,"
            " such as student.ttft_p95=0.3"
        )
    if kind == "max-regress" and bound < 0:
        raise LimitError(f"--{kind} {text!r}: give a share of 0 or more, such as 0.1 for 10 %")
    return Limit(kind, match["arm"], load, match["metric"], bound)


def check(summary: Summary, baseline: Summary | None, limits: Sequence[Limit]) -> list[Broken]:
    """Return what is broken, in the order of the limits; nothing: the gate is open.

    Of a run that cannot be believed no limit is looked at. A metric that has too little data
    keeps no limit on it.

    Raises:
        LimitError: unknown arm, load or metric, each with those that are known; a regression
            without a baseline.
    """
    metrics = metrics_of(summary)
    known = metrics_of(baseline) if baseline else None
    may_fail = any(limit.metric == "failed_share" for limit in limits)
    broken = _invalid("the run", summary, may_fail)
    if baseline and any(limit.kind == "max-regress" for limit in limits):
        broken += _invalid("the baseline", baseline, may_fail)
    if broken:
        return broken
    for limit in limits:
        for place in _places(limit, metrics):
            reason = _why_broken(limit, metrics[place].get(limit.metric), place, known)
            broken += [Broken(limit, place[1], reason)] if reason else []
    return broken


def _invalid(name: str, summary: Summary, may_fail: bool) -> list[Broken]:
    """Return why a run's numbers hold no limit: it is INVALID, or too much of it failed.

    A limit on `failed_share` says itself how much may fail.
    """
    broken = []
    if not summary.validity.is_valid:
        broken += [f"{name} is INVALID: {'; '.join(summary.validity.problems)}"]
    if not may_fail and (excess := describe_excess(summary)):
        broken += [f"{name}: {excess}"]
    return [Broken(None, None, reason) for reason in broken]


def _places(limit: Limit, metrics: Metrics) -> list[Place]:
    """Return where a limit holds. LimitError: nowhere."""
    arms, loads = {arm for arm, _ in metrics}, {load for _, load in metrics}
    if limit.arm not in arms:
        raise LimitError(f"{limit}: no arm {limit.arm!r}; the run has {_listed(arms)}")
    if limit.load is not None and limit.load not in loads:
        raise LimitError(f"{limit}: no load {limit.load:g}; the run has {_listed(loads)}")
    if not is_known(limit.metric):
        raise LimitError(f"{limit}: no metric {limit.metric!r}; there are {known_names()}")
    return [place for place in metrics if place == (limit.arm, limit.load or place[1])]


def _why_broken(
    limit: Limit, found: Estimate | None, place: Place, baseline: Metrics | None
) -> str | None:
    if found is None:
        return "not measured, or with too few requests"
    if limit.kind == "min":
        return f"{found.value:.4g} is less" if found.value < limit.bound else None
    if limit.kind == "max":
        return f"{found.value:.4g} is more" if found.value > limit.bound else None
    if baseline is None:
        raise LimitError(f"{limit}: a regression is against a --baseline; give a run's folder")
    before = baseline.get(place, {}).get(limit.metric)
    if before is None:
        return "the baseline has not measured it"
    worse = regression(limit.metric, before.value, found.value)
    if worse <= limit.bound:
        return None
    return f"{found.value:.4g} after {before.value:.4g} is {worse:.1%} worse"


def regression(metric: str, before: float, now: float) -> float:
    """Return by which share of `before` a metric got worse; below 0 it got better.

    >>> regression("ttft_p95", 0.2, 0.25), regression("pass@1", 0.5, 0.4)
    (0.25, 0.2)
    """
    worse = before - now if is_higher_better(metric) else now - before
    if not before:
        return math.copysign(math.inf, worse) if worse else 0.0
    return round(worse / abs(before), 12)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listed(names: Iterable[str | float]) -> str:
    return ", ".join(
        f"{name:g}" if isinstance(name, float) else name for name in sorted(names, key=str)
    )
