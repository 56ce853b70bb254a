"""The aliases say what our metrics say."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.engine.sequence import FinishReason, GenerationRequest
from serve.metrics.server_metrics import ServerMetrics
from serve.metrics.vllm_names import register_vllm_aliases
from serve.pair.served import Role
from serve.sampling.params import SamplingParams

# vLLM's name: (type, our name).
ALIASES = {
    "num_requests_running": ("gauge", "sequences_running"),
    "num_requests_waiting": ("gauge", "sequences_waiting"),
    "kv_cache_usage_perc": ("gauge", "kv_slots_used_ratio"),
    "gpu_cache_usage_perc": ("gauge", "kv_slots_used_ratio"),
    "time_to_first_token_seconds": ("histogram", "time_to_first_token_seconds"),
    "inter_token_latency_seconds": ("histogram", "inter_token_latency_seconds"),
    "time_per_output_token_seconds": ("histogram", "inter_token_latency_seconds"),
    "e2e_request_latency_seconds": ("histogram", "request_duration_seconds"),
    "request_queue_time_seconds": ("histogram", "request_queue_seconds"),
    "prompt_tokens": ("counter", "prompt_tokens"),
    "generation_tokens": ("counter", "generation_tokens"),
}


@pytest.fixture
def metrics(make_pair: Any) -> ServerMetrics:
    """Of two engines in the middle of their work, with the aliases."""
    pair = make_pair(max_num_seqs=2)
    for model in pair.engines.loaded:
        pair.metrics.watch(model)
        sampling = SamplingParams(num_samples=5, max_tokens=3, ignore_eos=True)
        model.engine.submit(GenerationRequest("r", (40, 41), sampling), lambda events: None)
        for _ in range(4):
            model.engine.step()
    pair.metrics.request_duration.labels("student").observe(0.25)
    register_vllm_aliases(pair.metrics)
    return pair.metrics  # type: ignore[no-any-return]


def exposed(metrics: ServerMetrics) -> dict[str, Any]:
    text = generate_latest(metrics.registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a doubled family"
    return {family.name: family for family in families}


def values(family: Any, label: str) -> dict[tuple[object, ...], float]:
    """Values by role, what follows the family's name in the sample's, and `le`."""
    return {
        (s.labels[label], s.name.removeprefix(family.name), s.labels.get("le")): s.value
        for s in family.samples
    }


@pytest.mark.parametrize("name", ALIASES)
def test_alias_has_the_values_of_its_source(metrics: ServerMetrics, name: str) -> None:
    families, (kind, source) = exposed(metrics), ALIASES[name]
    alias, ours = families[f"vllm:{name}"], families[f"tandem_{source}"]
    assert alias.type == kind and alias.documentation
    assert values(alias, "model_name") == values(ours, "role")
    assert {role for role, _, _ in values(alias, "model_name")} == {"student", "teacher"}
    assert any(values(alias, "model_name").values()), "there is something to compare"


def test_finished_reasons_are_those_of_vllm() -> None:
    metrics = ServerMetrics(CollectorRegistry())
    observer = metrics.observer(Role.STUDENT)
    register_vllm_aliases(metrics)
    for count, reason in enumerate(FinishReason, 1):
        for _ in range(count):
            observer.on_finished(reason)
    family = exposed(metrics)["vllm:request_success"]
    counts = {s.labels["finished_reason"]: s.value for s in family.samples}
    # In the order of FinishReason: stop, length, cancelled, deadline, error, shutdown.
    assert counts == {"stop": 1, "length": 2, "abort": 3 + 4 + 6, "error": 5}
    assert {s.labels["model_name"] for s in family.samples} == {"student"}
    assert family.type == "counter" and family.samples[0].name.endswith("_total")


def test_there_are_no_other_aliases(metrics: ServerMetrics) -> None:
    names = {name for name in exposed(metrics) if name.startswith("vllm:")}
    assert names == {f"vllm:{name}" for name in (*ALIASES, "request_success")}


def test_aliases_are_registered_once(metrics: ServerMetrics) -> None:
    with pytest.raises(ValueError, match="vllm:"):
        register_vllm_aliases(metrics)


def test_without_the_option_there_is_no_alias() -> None:
    assert not any(name.startswith("vllm:") for name in exposed(ServerMetrics(CollectorRegistry())))
