"""What a server that worked exposes is clean; by promtool where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.tandem.v1 import inference_pb2 as pb

PROMTOOL = shutil.which("promtool")


@pytest.fixture(scope="module")
def text(serving: Any, make_pair: Any) -> str:
    """`/metrics` of a server that answered, refused, and had a call cancelled."""
    with serving(make_pair(), tasks=frozenset({"sums"})) as live:
        evaluation: dict[str, Any] = {
            "answer_format": "last_number",
            "task": "sums",
            "pass_at_k": [1, 2],
        }
        for reference in (None, "2"):
            live.stub.Compare(
                pb.CompareRequest(
                    prompt="1+1=",
                    sampling=pb.SamplingParams(num_samples=2, max_tokens=5),
                    divergence=pb.DivergenceOptions(exact=True),
                    evaluation=pb.EvaluationOptions(**evaluation, reference_answer=reference),
                )
            )
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            live.stub.Compare(pb.CompareRequest())
        cancelled = live.stub.Generate(pb.GenerateRequest(prompt="x"))
        next(iter(cancelled))
        cancelled.cancel()
        with urllib.request.urlopen(live.server.metrics_url, timeout=10) as reply:
            return str(reply.read().decode())


def test_no_series_and_no_family_comes_twice(text: str) -> None:
    assert len(list(text_string_to_metric_families(text))) > 30
    series = re.findall(r"^(tandem_\S+) ", text, re.MULTILINE)
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    for names in (series, families):
        assert len(set(names)) == len(names)
    assert "_created" not in text


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH")
def test_promtool_is_content(text: str) -> None:
    checked = promtool(text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def promtool(text: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
