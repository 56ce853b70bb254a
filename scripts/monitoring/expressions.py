"""Every expression of dashboard and rules, and what a real Prometheus says to each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.monitoring.dashboard import dashboard
from scripts.monitoring.processes import RULES, CheckError, Prometheus, shorten_for_few

# Grafana's variables, as they are where all is selected, for scrapes a second apart.
VARIABLES = {
    "$namespace": ".*",
    "$job": ".*",
    "$task": ".*",
    "$policy": ".*",
    "$__rate_interval": "6s",
}
# What may have no series on a healthy server under this load, by a piece of the expression.
RIGHTLY_EMPTY = {
    "tandem_remote_calls_total": "the teacher runs in the same server",
    "ALERTS": "nothing is wrong",
}


@dataclass(frozen=True, slots=True)
class Expression:
    """`source` is what it belongs to; `kind` is dashboard, record or alert."""

    kind: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class ExpressionVerdict:
    """`problem` is empty when the expression did what it should; `note` says what it returned."""

    expression: Expression
    note: str
    problem: str = ""


def dashboard_expressions(drawn: dict[str, Any] | None = None) -> Iterator[Expression]:
    """Yield the queries of panels and variables, the variables in them replaced."""
    drawn = drawn or dashboard()
    for panel in drawn["panels"]:
        for target in panel.get("targets", ()):
            yield Expression("dashboard", panel["title"], substitute(target["expr"]))
    for variable in drawn["templating"]["list"]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable.get("definition", ""))
        if match:
            values = f"count by ({match[2]}) ({match[1]})"
            yield Expression("dashboard", f"${variable['name']}", substitute(values))


def rule_expressions() -> Iterator[Expression]:
    """Yield the rules as the Prometheus of the check has them: shortened, for few events."""
    for path in sorted(RULES.glob("*.yaml")):
        for rule in read_rules(path, shorten_for_few(path.read_text())):
            kind = "record" if "record" in rule else "alert"
            yield Expression(kind, rule[kind], rule["expr"])


def read_rules(path: Path, text: str | None = None) -> list[dict[str, Any]]:
    """Return all rules of a file, or of `text` in its place."""
    groups = yaml.safe_load(path.read_text() if text is None else text)["groups"]
    return [rule for group in groups for rule in group["rules"]]


def substitute(text: str) -> str:
    """Replace Grafana's variables; CheckError for one that is not known."""
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    if "$" in text:
        raise CheckError(f"a variable has no value: {text}")
    return text


def judge(expression: Expression, prometheus: Prometheus) -> ExpressionVerdict:
    """Evaluate: everything must succeed, and have numbers unless an alert or rightly empty."""
    try:
        series = prometheus.query(expression.text)
    except CheckError as error:
        return ExpressionVerdict(expression, "refused", str(error))
    reason = next((why for part, why in RIGHTLY_EMPTY.items() if part in expression.text), "")
    num_series = sum(one["value"][1] != "NaN" for one in series)
    if expression.kind == "alert":
        return ExpressionVerdict(expression, f"{num_series} series")
    if num_series == 0:
        return ExpressionVerdict(
            expression, f"empty: {reason}", "" if reason else "it returned no number"
        )
    return ExpressionVerdict(expression, f"{num_series} series")
