"""The recording rules that give Tandem's series vLLM's names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from scripts.monitoring.expressions import read_rules
from serve.engine.sequence import FinishReason
from serve.metrics.server_metrics import ServerMetrics
from tests.deploy.test_monitoring import METRIC, SERIES_SUFFIX

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring" / "vllm"
RULES = {rule["record"]: rule["expr"] for rule in read_rules(FOLDER / "vllm-names.yaml")}
PROMTOOL = shutil.which("promtool")


def test_vllm_rules_read_series_of_the_server() -> None:
    families = ServerMetrics(CollectorRegistry()).registry.collect()
    known = {f.name + ("_total" if f.type == "counter" else ""): f.type for f in families}
    for record, expression in RULES.items():
        assert record.startswith("vllm:")
        (source,) = METRIC.findall(expression)
        base = SERIES_SUFFIX.sub("", source)
        assert source in known or known[base] == "histogram", source
        assert record.endswith(source.removeprefix(base)), "another series of the histogram"


def test_vllm_rules_name_every_way_in_which_a_sample_ends() -> None:
    expression = RULES["vllm:request_success_total"]
    assert all(reason.value in expression for reason in FinishReason)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH")
def test_vllm_rules_give_the_values_and_labels_that_vllm_has() -> None:
    assert PROMTOOL is not None
    test = FOLDER / "promtool-test.yaml"
    done = subprocess.run([PROMTOOL, "test", "rules", test], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
