"""`report.html`: what a run found, in one file that needs no server, no network and no script.

It is made from the artifacts of a run's folder alone. Its text is in `data/report.html.j2`, its
plots come from `plot_data`. What was not measured is said, never drawn as 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.analysis.summary import ArmComparison, Cell, Distribution, Summary, read_summary
from loadtest.client.requests_file import REQUESTS_FILE, read_requests
from loadtest.config import RunConfig
from loadtest.flags import flag_of
from loadtest.folder import REPORT_FILE, read_run, write_text
from loadtest.records import RequestRecord
from loadtest.report.plot_data import (
    KL_TO_TEACHER,
    draw_plots,
    is_closed,
    load_label,
    pareto_quality,
)
from loadtest.report.plots import arm_styles
from loadtest.report.summary_text import describe_failures
from loadtest.report.timeline import Gauge
from report import formats
from report.page import render_page

# Of run.json; what has a place of its own on the page, or would only be noise there.
_SHOWN_ELSEWHERE = {
    "config", "timeline", "versions", "models", "schedule_sha256", "command", "divergence_problem",
    "problems", "notes", "costs", "cross_check",
}  # fmt: skip
_SPEEDS = {
    "ttft_p50": "first token, median",
    "ttft_p95": "first token, p95",
    "itl_p50": "between tokens, median",
    "itl_p95": "between tokens, p95",
    "tpot_p50": "time per output token, median",
    "e2e_p50": "end to end, median",
    "e2e_p95": "end to end, p95",
    "output_tokens_per_s": "output tokens per second",
}
LATENCIES: tuple[tuple[str, Callable[[Cell], Distribution]], ...] = (
    ("Time to first token", lambda cell: cell.ttft),
    ("Between tokens", lambda cell: cell.itl),
    ("Time per output token", lambda cell: cell.tpot),
    ("End to end", lambda cell: cell.e2e),
)


@dataclass(frozen=True, slots=True)
class HeadlineFinding:
    """One line of the headline: what was compared, the number with its interval, its meaning."""

    name: str
    text: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Headline:
    """Two arms compared: a row per quantity with its finding at each of the loads, if any."""

    arm_a: str
    arm_b: str
    loads: tuple[float, ...]
    num_pairs: tuple[int, ...]
    rows: tuple[tuple[str, tuple[HeadlineFinding | None, ...]], ...]


def write_report(folder: Path) -> Path:
    """Write a run's report beside its artifacts, and return its path.

    UserError: an artifact is missing or broken.
    """
    page = render_report(
        read_summary(folder),
        read_run(folder),
        read_requests(folder / REQUESTS_FILE),
    )
    path = folder / REPORT_FILE
    write_text(path, page)
    return path


def render_report(result: Summary, run: Mapping[str, Any], records: Sequence[RequestRecord]) -> str:
    """Return the page; `run` is run.json, `records` the warm-up's too."""
    styles = arm_styles(_arms(result, records))
    return render_page(
        "loadtest",
        draw_plots(result, records, gauges_of(run), styles),
        summary=result,
        styles=styles,
        failures=describe_failures(result),
        headlines=headlines(result),
        latencies=LATENCIES,
        ks=sorted({k for cell in result.cells if cell.quality for k in cell.quality.pass_at_k}),
        load_label=lambda load: load_label(result, load),
        is_closed=is_closed(result),
        is_kl_pareto=pareto_quality(result) == KL_TO_TEACHER,
        facts=[(key, value) for key, value in run.items() if key not in _SHOWN_ELSEWHERE],
        divergence_problem=run.get("divergence_problem"),
        command=command_of(run),
    )


def _arms(result: Summary, records: Sequence[RequestRecord]) -> tuple[str, ...]:
    """Return all arms, in the order of the settings, which keeps their looks between runs."""
    asked = result.config.get("arms")
    names = [str(arm) for arm in asked] if isinstance(asked, list | tuple) else []
    names += [cell.arm for cell in result.cells] + [record.plan.arm for record in records]
    return tuple(dict.fromkeys(names))


def headlines(result: Summary) -> list[Headline]:
    """Return one table for every two arms that were compared."""
    pairs = dict.fromkeys((each.arm_a, each.arm_b) for each in result.comparisons)
    return [
        _headline(result, [c for c in result.comparisons if (c.arm_a, c.arm_b) == pair])
        for pair in pairs
    ]


def _headline(result: Summary, comparisons: Sequence[ArmComparison]) -> Headline:
    columns = [{f.name: f for f in findings(result, each)} for each in comparisons]
    names = dict.fromkeys(name for column in columns for name in column)
    return Headline(
        arm_a=comparisons[0].arm_a,
        arm_b=comparisons[0].arm_b,
        loads=tuple(each.load for each in comparisons),
        num_pairs=tuple(each.num_pairs for each in comparisons),
        rows=tuple((name, tuple(column.get(name) for column in columns)) for name in names),
    )


def findings(result: Summary, comparison: ArmComparison) -> list[HeadlineFinding]:
    """Return what the comparison of two arms at one load came to: speed first, then quality."""
    speeds = [
        HeadlineFinding(
            _SPEEDS.get(name, name),
            formats.show_ratio(ratio),
            formats.judge(ratio, 1.0, "faster", "slower"),
        )
        for name, ratio in comparison.ratios.items()
    ]
    differences = [
        HeadlineFinding(
            name,
            formats.show_points(difference),
            formats.judge(difference, 0.0, "better", "worse"),
        )
        for name, difference in comparison.differences.items()
    ]
    return speeds + differences + _closeness(result, comparison)


def _closeness(result: Summary, comparison: ArmComparison) -> list[HeadlineFinding]:
    """Return how alike the two arms are; not measured is a finding, too."""
    a, b = comparison.arm_a, comparison.arm_b
    cell = result.cell(a, comparison.load)
    quality = cell.quality if cell else None
    p = comparison.mcnemar_p
    judged = [] if comparison.differences else [HeadlineFinding("pass@k", formats.NOT_MEASURED, "")]
    return [
        *judged,
        *([] if p is None else [HeadlineFinding("McNemar's p of the correctness", f"{p:.3g}", "")]),
        HeadlineFinding(
            "agreement of the majorities",
            formats.show_percent_estimate(comparison.agreement),
            "",
        ),
        HeadlineFinding(
            f"exact KL({a} ‖ {b}), nats per token",
            formats.show_estimate(quality.exact_kl if quality else None),
            "",
        ),
        HeadlineFinding(
            f"k3 estimate of KL({a} ‖ {b}), nats per token",
            formats.show_estimate(quality.k3 if quality else None),
            "",
        ),
    ]


def gauges_of(run: Mapping[str, Any]) -> list[Gauge]:
    """Return run.json's `timeline`: by role, a list of what the server's gauges said when."""
    return [
        Gauge(role, each["time_s"], each["waiting"], each["running"], each["batch"])
        for role, found in run.get("timeline", {}).items()
        for each in found
    ]


def command_of(run: Mapping[str, Any]) -> str:
    """Return the command that makes such a run, ready to be pasted into a shell.

    It is the one that was given; where the run was started from Python, the one that it amounts to.
    """
    words = run.get("command", [])
    if words[1:3] == ["loadtest", "run"]:
        return shlex.join(words)
    words = ["tandem", "loadtest", "run"]
    config = run.get("config", {})
    for name, field in RunConfig.model_fields.items():
        value = config.get(name)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if value is not None and value != default:
            parts = value if isinstance(value, list) else [value]
            words += [flag_of(name), ",".join(map(str, parts))]
    return shlex.join(words)
