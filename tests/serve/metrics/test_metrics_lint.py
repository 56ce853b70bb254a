"""What a server that worked exposes is clean: by promtool where there is one, by its rules here.

The rules are those of promtool 2.42 (`promtool check metrics`), written anew for a machine without
it. Debian has promtool in its package `prometheus`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.tandem.v1 import inference_pb2 as pb

PROMTOOL = shutil.which("promtool")
TYPES = ("counter", "gauge", "histogram", "summary")
BASE_UNITS = {
    "seconds": "second minute minutes hour hours day days week weeks",
    "bytes": "bit bits byte",
    "celsius": "kelvins fahrenheit rankine",
    "meters": "inch inches yard yards mile miles foot feet",
    "grams": "pound pounds ounce ounces",
    "joules": "calorie calories",
    "volts": "",
    "amperes": "",
}
UNIT_PREFIXES = "pico nano micro milli centi deci deca hecto kilo kibi mega mebi giga gibi tera"
ABBREVIATIONS = "s ms us ns sec b kb mb gb tb pb m h d"


@dataclass(frozen=True, slots=True)
class Exposed:
    """A family as the text names it: a counter's name ends in `_total`."""

    name: str
    kind: str
    help: str
    labels: frozenset[str]


def parse(text: str) -> list[Exposed]:
    """Return the families; ValueError when the text is not of Prometheus' format."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        of_family = {label for sample in family.samples for label in sample.labels}
        labels[family.name] = labels[f"{family.name}_total"] = of_family
    return [
        Exposed(name, kind, helps.get(name, "").strip(), frozenset(labels[name]))
        for name, kind in kinds.items()
    ]


def problems(family: Exposed) -> Iterator[str]:
    """Yield what promtool's linter would say."""
    name, kind = family.name, family.kind
    words = name.split("_")
    if not family.help:
        yield "no help text"
    if (kind == "counter") != name.endswith("_total"):
        yield "_total is the suffix of counters, and only theirs"
    if kind not in ("histogram", "summary"):
        yield from (f"reserved {s}" for s in ("_bucket", "_count", "_sum") if name.endswith(s))
    if kind != "histogram" and "le" in family.labels:
        yield "le is reserved for histograms"
    if kind != "summary" and "quantile" in family.labels:
        yield "quantile is reserved for summaries"
    if set(words) & set(TYPES):
        yield "a type in the name"
    if ":" in name:
        yield "colons are for recording rules"
    yield from (f"camel case: {n}" for n in (name, *family.labels) if re.search("[a-z][A-Z]", n))
    yield from (f"abbreviated unit: {word}" for word in words if word in ABBREVIATIONS.split())
    yield from (f"not a base unit: {word}" for word in words if not is_base(word))


def is_base(word: str) -> bool:
    if any(word in others.split() for others in BASE_UNITS.values()):
        return False
    return not any(word == prefix + unit for prefix in UNIT_PREFIXES.split() for unit in BASE_UNITS)


BAD = {
    "no help text": "# TYPE a_total counter\na_total 1\n",
    "_total is": "# HELP a x\n# TYPE a counter\na 1\n",
    "only theirs": "# HELP a_total x\n# TYPE a_total gauge\na_total 1\n",
    "reserved _sum": "# HELP a_sum x\n# TYPE a_sum gauge\na_sum 1\n",
    "le is reserved": '# HELP a x\n# TYPE a gauge\na{le="1"} 1\n',
    "quantile is": '# HELP a x\n# TYPE a gauge\na{quantile="1"} 1\n',
    "a type in": "# HELP a_gauge x\n# TYPE a_gauge gauge\na_gauge 1\n",
    "colons": "# HELP a:b x\n# TYPE a:b gauge\na:b 1\n",
    "camel case: aB": "# HELP aB x\n# TYPE aB gauge\naB 1\n",
    "camel case: cD": '# HELP a x\n# TYPE a gauge\na{cD="1"} 1\n',
    "abbreviated": "# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n",
    "unit: minutes": "# HELP a_minutes x\n# TYPE a_minutes gauge\na_minutes 1\n",
    "unit: millivolts": "# HELP a_millivolts x\n# TYPE a_millivolts gauge\na_millivolts 1\n",
}


@pytest.mark.parametrize("problem", BAD)
def test_rule_finds_what_it_is_for(problem: str) -> None:
    (family,) = parse(BAD[problem])
    assert any(problem in found for found in problems(family))


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH")
@pytest.mark.parametrize("problem", BAD)
def test_promtool_agrees_with_the_rule(problem: str) -> None:
    assert promtool(BAD[problem]).returncode != 0


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


def test_exposition_keeps_the_rules(text: str) -> None:
    families = parse(text)
    assert len(families) > 30
    assert {f.name: found for f in families if (found := list(problems(f)))} == {}


def test_no_series_and_no_family_comes_twice(text: str) -> None:
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
