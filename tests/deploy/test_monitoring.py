"""Rules, dashboard and runbook fit each other and the server; the check's own parts work."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from bundle.verify import verify_bundle
from scripts.monitoring import processes
from scripts.monitoring.dashboard import dashboard
from scripts.monitoring.expressions import (
    Expression,
    dashboard_expressions,
    judge,
    read_rules,
    rule_expressions,
    substitute,
)
from scripts.monitoring.processes import CheckError, Prometheus, shorten, wait_until
from scripts.monitoring.rehearsal import ALERT, Webhook, receiving, watch_quiet
from serve.metrics.server_metrics import ServerMetrics
from tests.support.tiny_bundle import damage_bundle, shared_tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
RULES = [rule for path in sorted((FOLDER / "rules").glob("*.yaml")) for rule in read_rules(path)]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"] for rule in RULES if "record" in rule}
METRIC = re.compile(r"\btandem_[a-z0-9_]+")
RECORD = re.compile(r"\btandem:[a-z0-9_]+:[a-z0-9_]+")
SERIES_SUFFIX = re.compile(r"_(bucket|count|sum)$")


def rule_cases() -> Iterator[tuple[str, bool]]:
    """Yield the alert of each case of promtool's tests, and whether it fires there."""
    for path in (FOLDER / "tests").glob("*.yaml"):
        for group in yaml.safe_load(path.read_text())["tests"]:
            for case in group["alert_rule_test"]:
                yield case["alertname"], bool(case["exp_alerts"])


def exposed() -> dict[str, str]:
    """Return the type of each metric of a server, by its name in expressions."""
    families = ServerMetrics(CollectorRegistry()).registry.collect()
    return {f.name + ("_total" if f.type == "counter" else ""): f.type for f in families}


def used_metrics() -> set[str]:
    return {name for text in all_expressions() for name in METRIC.findall(text)}


def all_expressions() -> list[str]:
    drawn = [expression.text for expression in dashboard_expressions()]
    return drawn + [rule["expr"] for rule in RULES]


# --- rules, dashboard, runbook


def test_every_alert_has_a_firing_and_a_quiet_case() -> None:
    assert set(rule_cases()) == set(itertools.product(ALERTS, (True, False)))


def test_cases_evaluate_records_before_alerts() -> None:
    """Otherwise promtool takes the groups in an order of chance, and values vary."""
    names = [
        group["name"]
        for file in ("recording", "alerts")
        for group in yaml.safe_load((FOLDER / "rules" / f"{file}.yaml").read_text())["groups"]
    ]
    for path in (FOLDER / "tests").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["group_eval_order"] == names, path.name


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_and_how_bad_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["description"].endswith(".")
    assert alert["annotations"]["runbook_url"].endswith(f"docs/runbook.md#{name.lower()}")
    assert "for" in alert, "a single bad scrape would fire it"


def test_runbook_has_an_entry_for_each_alert_and_for_no_other() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    entries = re.split(r"^## ", runbook, flags=re.MULTILINE)[1:]
    by_name = {entry.split("\n")[0]: entry for entry in entries if entry.startswith("Tandem")}
    assert set(by_name) == set(ALERTS)
    for name, entry in by_name.items():
        severity = ALERTS[name]["labels"]["severity"].capitalize()
        assert f"**{severity}.**" in entry, f"{name} is {severity}"
        assert "**Users**" in entry and "**False alarm**" in entry, name
        assert "**Look" in entry and re.search(r"\bdo\b", entry, re.IGNORECASE), name


def test_every_metric_that_is_used_is_one_of_the_server() -> None:
    known = exposed()
    histograms = {name for name, kind in known.items() if kind == "histogram"}
    for name in used_metrics():
        assert name in known or SERIES_SUFFIX.sub("", name) in histograms, name


def test_every_metric_of_the_server_is_shown_or_judged() -> None:
    used = used_metrics()
    used |= {SERIES_SUFFIX.sub("", name) for name in used}
    assert set(exposed()) - used == set()


def test_every_recorded_series_that_is_used_is_recorded() -> None:
    used = {name for text in all_expressions() for name in RECORD.findall(text)}
    assert used <= RECORDS


def test_promised_latencies_are_bounds_of_the_histogram() -> None:
    metric = ServerMetrics(CollectorRegistry()).time_to_first_token
    metric.labels("student")
    (collected,) = metric.collect()
    bounds = {s.labels["le"] for s in collected.samples if s.name.endswith("_bucket")}
    constants = [
        rule for rule in RULES if rule.get("record") == "tandem:slo_ttft:threshold_seconds"
    ]
    assert {rule["labels"]["role"] for rule in constants} == {"student", "teacher"}
    for rule in constants:
        assert str(float(rule["expr"].removeprefix("vector(")[:-1])) in bounds


def test_dashboard_has_its_rows_and_says_what_each_number_means() -> None:
    panels = dashboard()["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert {"Latency", "Throughput", "Divergence", "Consensus", "pass@k", "Shadowing"} <= set(rows)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"] and all(target["expr"] for target in panel["targets"])


def test_panels_fill_their_rows_without_covering_each_other() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


# --- generated files


def test_generated_files_are_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_monitoring", "--check"], check=True)


def test_stale_generated_file_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "scripts"
    (copy / "monitoring").mkdir(parents=True)
    (tmp_path / "k8s" / "monitoring").mkdir(parents=True)
    for name in ("make_monitoring", "monitoring/dashboard.py", "monitoring/panels.py"):
        (copy / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    done = subprocess.run(
        [sys.executable, copy / "make_monitoring", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "prometheusrule.yaml is out of date: run scripts/make_monitoring" in done.stderr


def test_custom_resources_have_the_rules_word_for_word() -> None:
    resources = yaml.safe_load_all((FOLDER / "prometheusrule.yaml").read_text())
    groups = [group for resource in resources for group in resource["spec"]["groups"]]
    assert [rule for group in groups for rule in group["rules"]] == RULES


# --- the check


class FakePrometheus:
    """Answers every query alike; an exception is raised."""

    def __init__(self, *values: str, error: str = "", firing: frozenset[str] = frozenset()) -> None:
        self.series = [{"metric": {}, "value": [0, value]} for value in values]
        self.error = error
        self.firing = lambda: firing

    def query(self, expression: str) -> list[dict[str, Any]]:
        if self.error:
            raise CheckError(self.error)
        return self.series


@pytest.mark.parametrize(
    ("kind", "text", "prometheus", "problem"),
    [
        ("record", "up", FakePrometheus("1"), ""),
        ("record", "up", FakePrometheus(), "no number"),
        ("dashboard", "up", FakePrometheus("NaN"), "no number"),
        ("alert", "up == 0", FakePrometheus(), ""),
        ("alert", "up ==", FakePrometheus(error="parse error"), "parse error"),
        ("dashboard", "tandem_remote_calls_total", FakePrometheus(), ""),
    ],
)
def test_expression_is_judged_by_what_it_returns(
    kind: str, text: str, prometheus: Any, problem: str
) -> None:
    found = judge(Expression(kind, "somewhere", text), prometheus).problem
    assert problem in found and bool(problem) == bool(found)


def test_variables_are_replaced_and_an_unknown_one_is_an_error() -> None:
    assert substitute('up{job=~"$job"}[$__rate_interval]') == 'up{job=~".*"}[6s]'
    with pytest.raises(CheckError, match="a variable has no value"):
        substitute("$__range")


def test_durations_are_shortened_and_nothing_else() -> None:
    assert shorten("tandem:kl_nats:mean5m[5m] offset 1h > 14.4") == (
        "tandem:kl_nats:mean5m[4s] offset 8s > 14.4"
    )
    with pytest.raises(KeyError, match="7m"):
        shorten("up[7m]")


def test_shortened_rules_keep_everything_but_durations() -> None:
    for path in (FOLDER / "rules").glob("*.yaml"):
        text = path.read_text()
        assert processes.DURATION.sub("", text) == re.sub(r"(?<![\w.])\d+s\b", "", shorten(text))


def test_every_rule_is_evaluated_by_the_check() -> None:
    evaluated = {expression.source for expression in rule_expressions()}
    assert evaluated == RECORDS | set(ALERTS)


def test_waiting_ends_with_an_error_that_says_for_what() -> None:
    with pytest.raises(CheckError, match="the sun: not within 0 s"):
        wait_until(lambda: False, 0.0, "the sun")


def test_process_that_ends_at_its_start_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such bundle'); raise SystemExit(1)"]
    with (
        pytest.raises(CheckError, match="it ended at its start:\nno such bundle"),
        processes.running("it", command, tmp_path, "http://127.0.0.1:9/"),
    ):
        pass


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert processes.missing_tools() == ["prometheus", "prometheus-alertmanager"]


def test_refused_query_is_an_error_with_its_reason() -> None:
    with (
        answering(400, b'{"status": "error", "error": "parse error at char 5"}') as url,
        pytest.raises(CheckError, match="parse error at char 5"),
    ):
        Prometheus(url).query("up ==")


def test_scalar_counts_as_one_series() -> None:
    body = b'{"data": {"resultType": "scalar", "result": [0, "14.4"]}}'
    with answering(200, body) as url:
        assert Prometheus(url).query("14.4") == [{"metric": {}, "value": [0, "14.4"]}]


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Serve one answer to every GET, as Prometheus would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_webhook_finds_an_alert_that_is_told_to_fire() -> None:
    alerts = [
        {"status": status, "labels": {"alertname": name}}
        for status, name in (("firing", "Other"), ("resolved", ALERT), ("firing", ALERT))
    ]
    with receiving() as webhook:
        assert webhook.find(ALERT) is None
        body = json.dumps({"alerts": alerts}).encode()
        with urllib.request.urlopen(webhook.url, data=body, timeout=5) as answer:
            assert answer.status == 200
        assert webhook.find(ALERT) == alerts[2]


def test_alert_on_the_good_student_is_an_error() -> None:
    too_eager: Any = FakePrometheus("1", firing=frozenset({ALERT}))
    with pytest.raises(CheckError, match="fired on the good student"):
        watch_quiet(too_eager, Webhook("unused"))


def test_damaged_bundle_is_intact_by_its_hashes_and_has_other_weights(tmp_path: Path) -> None:
    good = shared_tiny_bundle()
    damaged = damage_bundle(good, tmp_path / "damaged")
    graph = {"onnx/fp32/model.onnx", "onnx/fp32/model.onnx.data"}
    first, second = verify_bundle(good), verify_bundle(damaged)
    assert {name for name in first.files if first.files[name] != second.files[name]} == graph
    assert first.teacher == second.teacher
