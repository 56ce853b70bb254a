"""Series whose labels are known are there from the start: increase() loses no first event."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.oip import grpc_service_pb2 as oip
from protos.oip.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from protos.tandem.v1 import inference_pb2 as pb
from serve.metrics.series import CODES
from serve.pair.served import Role
from serve.rpc.statuses import STATUS_CODES

Series = set[tuple[str, tuple[tuple[str, str], ...]]]


def series_of(live: Any) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in live.pair.metrics.registry.collect()
        for sample in family.samples
    }


def names(series: Series) -> set[str]:
    return {name for name, _ in series}


@pytest.fixture
def live(serving: Any, make_pair: Any) -> Iterator[Any]:
    with serving(make_pair(), tasks=frozenset({"sums"}), shadow_rate=1) as live:
        yield live


def test_first_events_find_their_series(live: Any) -> None:
    """Of both services, both planes, all routes, with and without a task; `k` alone is chosen."""
    before = series_of(live)
    sampling = pb.SamplingParams(num_samples=2, max_tokens=4)
    evaluation = pb.EvaluationOptions(
        answer_format="last_number", task="sums", pass_at_k=[1], reference_answer="2"
    )
    compared = pb.CompareRequest(prompt="1+1=", sampling=sampling, evaluation=evaluation)
    compared.divergence.exact = True
    live.client.compare(compared)
    for route in pb.Route.values():
        live.client.generate(
            pb.GenerateRequest(prompt="x", route=route, sampling=sampling)
        ).result()
    live.client.score(pb.ScoreRequest(prompt="x", completions=[pb.Completion(text="a")]))
    live.client.get_models()
    shadowed = pb.GenerateRequest(prompt="y", sampling=sampling)
    shadowed.divergence.enabled = False
    live.client.generate(shadowed).result()
    ask_open_inference(live)
    ask_control(live)
    with pytest.raises(grpc.RpcError):
        live.client.compare(pb.CompareRequest())
    assert names(series_of(live) - before) == {
        "tandem_pass_at_k_sum_total",
        "tandem_pass_at_k_prompts_total",
    }


def ask_open_inference(live: Any) -> None:
    stub = GRPCInferenceServiceStub(live.channel)
    prompt = oip.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"x")
    infer = oip.ModelInferRequest(model_name="student", inputs=[prompt])
    infer.parameters["max_tokens"].int64_param = 2
    stub.ModelInfer(infer)
    list(stub.ModelStreamInfer(iter([infer])))
    for rpc in ("ServerLive", "ServerReady", "ServerMetadata", "RepositoryIndex"):
        getattr(stub, rpc)(getattr(oip, f"{rpc}Request")())
    for rpc in ("ModelReady", "ModelMetadata", "ModelConfig"):
        getattr(stub, rpc)(getattr(oip, f"{rpc}Request")(name="student"))
    with pytest.raises(grpc.RpcError):
        stub.ModelReady(oip.ModelReadyRequest(name="judge"))


def ask_control(live: Any) -> None:
    live.control.status()
    live.control.set_policy(teacher_weight=1)
    live.control.policy()
    with pytest.raises(grpc.RpcError):
        live.control.abort("nobody")
    with pytest.raises(grpc.RpcError):
        live.control.set_policy(teacher_weight=2, expected_revision=1)


def test_all_codes_that_are_answered_are_known() -> None:
    mapped = {code for _, code in STATUS_CODES}
    assert mapped < set(CODES) and len(set(CODES)) == len(CODES)


def test_each_task_has_as_many_series(serving: Any, make_pair: Any) -> None:
    """So that their number is known: so many for a task, with both models here."""
    counts = []
    for tasks in ((), ("a",), ("a", "b"), ("a", "b", "other")):
        with serving(make_pair(), tasks=frozenset(tasks)) as live:
            counts.append(len(series_of(live)))
    assert counts[2] - counts[1] == counts[1] - counts[0] == 214
    assert counts[3] == counts[2]


def test_model_alone_has_nothing_to_be_compared_with(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        found = names(series_of(live))
    assert not any("divergence" in name or "consensus_total" in name for name in found)
