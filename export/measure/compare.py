"""Two bundles side by side: what the second, B, gains or loses against the first, A.

Everything is read from `manifest.json`, `eval/summary.json` and `eval/per_prompt.jsonl` (layout:
`export.measure.summary`, `export.measure.held_out`); no model runs. A difference is B − A. Where
both were measured on the same prompts it has a 95 % interval, from a bootstrap that draws the same
prompts for both; it is each row's own, not corrected for the number of rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bundle.manifest import Manifest, load_manifest
from bundle.model_inputs import differing_inputs
from estimators.bootstrap import (
    bootstrap_mean_difference,
    bootstrap_ratio_difference,
)
from estimators.estimate import Estimate
from estimators.pass_at_k import pass_at_k
from export.measure.summary import (
    SPEED_METRIC,
    STUDENT,
    SUMMARY_NAME,
    TEACHER,
    EvalSummary,
    PassRates,
    read_summary,
)
from export.run.errors import ExportError

Unit = Literal["nats per token", "share", "tokens/s", "bytes"]
TASK_SETTINGS = ("num_samples", "temperature", "max_tokens")
RENDER_WIDTH = 150


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric of one model in both bundles; None where a bundle does not have it."""

    model: str
    metric: str
    unit: Unit
    is_lower_better: bool
    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None

    @property
    def is_significant(self) -> bool | None:
        """Whether the interval of the difference excludes 0; None without an interval."""
        if self.difference is None or self.difference.interval is None:
            return None
        return self.difference.interval.excludes(0.0)

    @property
    def verdict(self) -> str:
        """What the difference shows: "B is better", "B is worse", or why neither."""
        if self.is_significant is None:
            return ""
        if not self.is_significant:
            return "no difference shown"
        assert self.difference is not None, "significant"
        return (
            "B is better" if (self.difference.value < 0) == self.is_lower_better else "B is worse"
        )


@dataclass(frozen=True, slots=True)
class BundleComparison:
    """Bundle `b` against bundle `a`; `mismatches` say why the numbers may not be comparable."""

    a: Path
    b: Path
    mismatches: tuple[str, ...]
    rows: tuple[MetricRow, ...]


def compare_bundles(a: Path, b: Path, *, is_forced: bool = False) -> BundleComparison:
    """Compare what two bundles' exports measured.

    Raises:
        BundleError: one of them is no bundle.
        ExportError: an evaluation is missing or damaged; or teachers, held-out prompts, tasks or
            their sampling differ, unless `is_forced`.
    """
    bundles = _load(a), _load(b)
    mismatches = _mismatches(*bundles)
    if mismatches and not is_forced:
        raise ExportError(
            f"{a} and {b} cannot be compared: {'; '.join(mismatches)}; "
            "force it to see the numbers all the same"
        )
    return BundleComparison(a, b, mismatches, tuple(_rows(_Both(*bundles))))


# --- reading


@dataclass(frozen=True, slots=True)
class _Measured:
    """A bundle's numbers; `prompts` and `tasks` are the rows of each kind of `per_prompt.jsonl`."""

    manifest: Manifest
    summary: EvalSummary
    prompts: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]


def _load(bundle: Path) -> _Measured:
    manifest = load_manifest(bundle)
    summary, rows_path = read_summary(bundle / "eval"), bundle / "eval" / "per_prompt.jsonl"
    rows = _read_json(rows_path, _read(rows_path).splitlines())
    prompts, tasks = ([r for r in rows if r["kind"] == kind] for kind in ("held_out", "task"))
    if len(prompts) != summary.num_prompts:
        raise ExportError(
            f"{rows_path} has {len(prompts)} held-out prompts, {SUMMARY_NAME} says "
            f"{summary.num_prompts}: export the bundle again"
        )
    return _Measured(manifest, summary, prompts, tasks)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ExportError(f"{path} does not exist: export the bundle again") from None


def _read_json(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return [json.loads(text) for text in texts]
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from None


def _at(value: Any, *path: str) -> Any:
    """Return what lies at a path of keys, None where it ends."""
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _mismatches(a: _Measured, b: _Measured) -> tuple[str, ...]:
    teachers = [x.manifest.teacher.weights_sha256 for x in (a, b)]
    prompts = [x.summary.prompts_sha256 for x in (a, b)]
    pairs = [("the teachers' weights", *teachers), ("the held-out prompts", *prompts)]
    x, y = a.manifest.teacher.inputs, b.manifest.teacher.inputs
    if x is not None and y is not None:
        names = differing_inputs(x, y)
        pairs += [(f"the teachers' {n}", x.get(n, "none"), y.get(n, "none")) for n in names]
    if (p := a.summary.tasks) and (q := b.summary.tasks):
        pairs.append(("the tasks", p.tasks_sha256, q.tasks_sha256))
        pairs += [
            (f"the tasks' {key}", str(getattr(p, key)), str(getattr(q, key)))
            for key in TASK_SETTINGS
        ]
    return tuple(f"{what} differ ({x[:12]} and {y[:12]})" for what, x, y in pairs if x != y)


# --- paired differences


RowValue = Callable[[Mapping[str, Any]], float | None]
"""Takes a row of `per_prompt.jsonl`; None where the model was not measured or gave no number."""


@dataclass(frozen=True, slots=True)
class _Both:
    """The two bundles under comparison."""

    a: _Measured
    b: _Measured

    def held_out_difference(self, numerator: RowValue) -> Estimate | None:
        """Return ratio B − ratio A of sums per token; None unless the prompts are the same."""
        if self.a.summary.prompts_sha256 != self.b.summary.prompts_sha256:
            return None
        a, b = _column(self.a.prompts, numerator), _column(self.b.prompts, numerator)
        if a is None or b is None:
            return None
        a_sizes, b_sizes = ([row["num_tokens"] for row in x.prompts] for x in (self.a, self.b))
        return bootstrap_ratio_difference(a, a_sizes, b, b_sizes)

    def task_difference(self, score: RowValue) -> Estimate | None:
        """Return mean B − mean A over the tasks; None unless they are the same."""
        a_tasks, b_tasks = self.a.summary.tasks, self.b.summary.tasks
        if not (a_tasks and b_tasks and a_tasks.tasks_sha256 == b_tasks.tasks_sha256):
            return None
        a, b = _column(self.a.tasks, score), _column(self.b.tasks, score)
        return None if a is None or b is None else bootstrap_mean_difference(a, b)


def _column(rows: Sequence[Mapping[str, Any]], value: RowValue) -> list[float] | None:
    """Return a value per row, None where any row has none."""
    values = [found for row in rows if (found := value(row)) is not None]
    return values if len(values) == len(rows) else None


# --- rows


@dataclass(frozen=True, slots=True)
class _Metric:
    """What a row shows, and how to read it from one bundle."""

    name: str
    unit: Unit
    is_lower_better: bool
    read: Callable[[_Measured], Estimate | None]


def _row(both: _Both, model: str, metric: _Metric, paired: Estimate | None = None) -> MetricRow:
    """Return a row with the paired difference, or else the plain one."""
    a, b = metric.read(both.a), metric.read(both.b)
    difference = None
    if a is not None and b is not None:
        difference = paired or Estimate(b.value - a.value)
    return MetricRow(model, metric.name, metric.unit, metric.is_lower_better, a, b, difference)


def _rows(both: _Both) -> Iterator[MetricRow]:
    yield from _quality_rows(both, STUDENT)
    for variant in dict.fromkeys([*both.a.manifest.variants, *both.b.manifest.variants]):
        yield _kl_row(both, STUDENT, variant)
        yield from _quality_rows(both, variant)
        yield _speed_row(both, variant)
        yield _size_row(both, variant)


def _quality_rows(both: _Both, model: str) -> Iterator[MetricRow]:
    yield _kl_row(both, TEACHER, model)
    yield _agreement_row(both, model)
    ks = _task_ks(both.a, model) | _task_ks(both.b, model)
    for k in sorted(ks):
        yield _pass_at_k_row(both, model, k)
    if ks:
        yield _majority_row(both, model)


def _kl_row(both: _Both, reference: str, model: str) -> MetricRow:
    def summed_kl(row: Mapping[str, Any]) -> float | None:
        forward_kl = _at(row, "forward_kl", reference, model)
        return None if forward_kl is None else forward_kl * row["num_tokens"]

    def read(measured: _Measured) -> Estimate | None:
        found = measured.summary.quality_of(reference, model)
        if found is None or found.forward_kl is None:
            return None
        if found.forward_kl_ci is None:
            return Estimate(found.forward_kl)
        return Estimate(found.forward_kl, found.forward_kl_ci.low, found.forward_kl_ci.high)

    metric = _Metric(f"KL({reference} ‖ model)", "nats per token", True, read)
    return _row(both, model, metric, both.held_out_difference(summed_kl))


def _agreement_row(both: _Both, model: str) -> MetricRow:
    def num_agreeing(row: Mapping[str, Any]) -> float | None:
        num_flips = _at(row, "num_flips", TEACHER, model)
        return None if num_flips is None else row["num_tokens"] - num_flips

    def read(measured: _Measured) -> Estimate | None:
        found = measured.summary.quality_of(TEACHER, model)
        return Estimate(found.argmax_agreement) if found else None

    metric = _Metric("top-1 agreement", "share", False, read)
    return _row(both, model, metric, both.held_out_difference(num_agreeing))


def _pass_at_k_row(both: _Both, model: str, k: int) -> MetricRow:
    def score(row: Mapping[str, Any]) -> float | None:
        n, num_correct = row["num_samples"], _at(row, "num_correct", model)
        return None if num_correct is None or k > n else pass_at_k(n, num_correct, k)

    def read(measured: _Measured) -> Estimate | None:
        rates = _pass_rates(measured, model)
        return rates.pass_at_k.get(k) if rates else None

    metric = _Metric(f"pass@{k}", "share", False, read)
    return _row(both, model, metric, both.task_difference(score))


def _majority_row(both: _Both, model: str) -> MetricRow:
    def majority(row: Mapping[str, Any]) -> float | None:
        found: float | None = _at(row, "majority", model)
        return found

    def read(measured: _Measured) -> Estimate | None:
        rates = _pass_rates(measured, model)
        return rates.majority_at_n if rates else None

    metric = _Metric("maj@n", "share", False, read)
    return _row(both, model, metric, both.task_difference(majority))


def _speed_row(both: _Both, name: str) -> MetricRow:
    def read(measured: _Measured) -> Estimate | None:
        variant = measured.manifest.variants.get(name)
        tokens_per_s = variant.metrics.get(SPEED_METRIC) if variant else None
        return None if tokens_per_s is None else Estimate(tokens_per_s)

    return _row(both, name, _Metric("decode speed", "tokens/s", False, read))


def _size_row(both: _Both, name: str) -> MetricRow:
    def read(measured: _Measured) -> Estimate | None:
        variant = measured.manifest.variants.get(name)
        return Estimate(variant.size_bytes) if variant else None

    return _row(both, name, _Metric("size of the graph", "bytes", True, read))


def _task_ks(measured: _Measured, model: str) -> set[int]:
    rates = _pass_rates(measured, model)
    return set(rates.pass_at_k) if rates else set()


def _pass_rates(measured: _Measured, model: str) -> PassRates | None:
    tasks = measured.summary.tasks
    return tasks.models[model].overall if tasks and model in tasks.models else None


# --- text


def render(comparison: BundleComparison) -> str:
    """Return the comparison as a table for a terminal, `RENDER_WIDTH` columns wide."""
    table = Table(title="95 % intervals over prompts; of B − A where the prompts are the same")
    for header in ("model", "metric"):
        table.add_column(header)
    for header in ("A", "B", "B − A"):
        table.add_column(header, justify="right")
    table.add_column("verdict")
    for model, rows in groupby(comparison.rows, key=lambda row: row.model):
        table.add_section()
        for name, row in zip(chain([model], repeat("")), rows, strict=False):
            numbers = (_spell(x, row.unit) for x in (row.a, row.b, row.difference))
            table.add_row(
                escape(name), f"{row.metric}, {_SCALES[row.unit][0]}", *numbers, row.verdict
            )
    console = Console(file=io.StringIO(), width=RENDER_WIDTH)
    with console.capture() as capture:
        console.print(f"A: {comparison.a}", f"B: {comparison.b}", sep="\n", markup=False)
        for mismatch in comparison.mismatches:
            console.print(f"not comparable: {mismatch}", markup=False)
        console.print(table)
    return capture.get()


_SCALES: Mapping[Unit, tuple[str, float, str]] = MappingProxyType(
    {
        "nats per token": ("nats", 1, ".4f"),
        "share": ("share", 1, ".3f"),
        "tokens/s": ("tokens/s", 1, ".0f"),
        "bytes": ("MB", 1e-6, ".0f"),
    }
)


def _spell(estimate: Estimate | None, unit: Unit) -> str:
    if estimate is None:
        return "–"
    _, scale, spec = _SCALES[unit]
    text = format(estimate.value * scale, spec)
    if estimate.interval is None:
        return text
    low, high = (format(x * scale, spec) for x in (estimate.interval.low, estimate.interval.high))
    return f"{text} [{low}, {high}]"
