"""ModelInfer of the Open Inference Protocol through a real channel, over fake models."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.client import violations
from serve.pair.served import Role
from tests.support.rpc.calls import failure
from tests.support.rpc.oip import (
    PROMPT,
    infer_request,
    names_of,
    stream,
    stub_of,
    tensor,
    text_input,
    value_of,
)

CODE = grpc.StatusCode


@pytest.fixture
def stub(live: Any) -> Any:
    return stub_of(live)


def samples(live: Any, **fields: Any) -> list[pb.Sample]:
    request = pb.GenerateRequest(
        prompt=PROMPT, sampling=pb.SamplingParams(max_tokens=8, seed=7), **fields
    )
    return [e.complete.sample for e in live.client.generate(request) if e.HasField("complete")]


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_inference_is_what_generate_says(live: Any, stub: Any, model: str) -> None:
    route = pb.ROUTE_TEACHER if model == "teacher" else pb.ROUTE_STUDENT
    (sample,) = samples(live, route=route, divergence=pb.DivergenceOptions(per_token=True))
    outputs = "k3 logprobs output_ids text_output"
    response = stub.ModelInfer(infer_request(model=model, outputs=outputs, id="mine"))
    assert (response.model_name, response.model_version, response.id) == (model, "1", "mine")
    assert names_of(response) == outputs.split()
    assert value_of(response, "output_ids") == list(sample.token_ids)
    assert value_of(response, "text_output") == sample.text
    assert value_of(response, "logprobs") == list(sample.logprobs)
    assert value_of(response, "k3") == pytest.approx(list(sample.divergence.per_token_k3))
    reason = response.parameters["finish_reason"].string_param
    assert f"FINISH_REASON_{reason.upper()}" == pb.FinishReason.Name(sample.finish_reason)


def test_every_form_of_the_prompt_gives_the_same(stub: Any, tokenizer: Any) -> None:
    ids, text = list(tokenizer.encode(PROMPT)), PROMPT.encode()
    n = len(ids)
    forms = [
        infer_request(),
        infer_request(tensor("text_input", "BYTES", [1, 1], bytes_contents=[text])),
        infer_request(tensor("input_ids", "INT64", [1, n], int64_contents=ids)),
        infer_request(tensor("input_ids", "INT64", [n], int64_contents=ids)),
        infer_request(tensor("input_ids", "INT64", [1, n])),
        infer_request(tensor("text_input", "BYTES", [1])),
    ]
    forms[4].raw_input_contents.append(np.array(ids, "<i8").tobytes())
    forms[5].raw_input_contents.append(n.to_bytes(4, "little") + text)
    responses = [stub.ModelInfer(form) for form in forms]
    assert all(response == responses[0] for response in responses)
    assert names_of(responses[0]) == ["output_ids", "text_output", "logprobs"]
    assert value_of(responses[0], "output_ids")


def test_every_form_of_a_setting_gives_the_same(stub: Any) -> None:
    settings = {"temperature": 0.5, "top_k": 5, "ignore_eos": True, "stop": ["9", "77"]}
    blob = json.dumps(settings).encode()
    forms = [
        infer_request(sampling_parameters=blob.decode()),
        infer_request(
            text_input(), tensor("sampling_parameters", "BYTES", [1], bytes_contents=[blob])
        ),
        infer_request(
            text_input(),
            tensor("stop", "BYTES", [1, 2], bytes_contents=[b"9", b"77"]),
            tensor("temperature", "FP32", [1], fp32_contents=[0.5]),
            tensor("top_k", "UINT8", [1, 1], uint_contents=[5]),
            tensor("ignore_eos", "BOOL", [1], bool_contents=[True]),
        ),
        infer_request(
            text_input(),
            tensor("stop", "BYTES", [2], bytes_contents=[b"9", b"77"]),
            temperature="0.5",
            top_k="5",
            ignore_eos="true",
        ),
    ]
    responses = [stub.ModelInfer(form) for form in forms]
    assert all(response == responses[0] for response in responses)
    assert responses[0] != stub.ModelInfer(infer_request())


def test_stop_token_is_the_last_one(stub: Any) -> None:
    token_ids = value_of(stub.ModelInfer(infer_request(ignore_eos=True)), "output_ids")
    stop = token_ids[3]
    response = stub.ModelInfer(infer_request(ignore_eos=True, stop_token_ids=stop))
    assert value_of(response, "output_ids") == token_ids[: token_ids.index(stop) + 1]
    assert response.parameters["finish_reason"].string_param == "stop"


def test_text_may_begin_with_the_prompt(live: Any, stub: Any) -> None:
    plain = stub.ModelInfer(infer_request())
    with_input = infer_request(exclude_input_in_output=False)
    assert value_of(stub.ModelInfer(with_input), "text_output") == PROMPT + value_of(
        plain, "text_output"
    )
    streamed = stream(live, with_input)
    text = "".join(value_of(response, "text_output") for response in streamed)
    assert text == PROMPT + value_of(plain, "text_output")


def test_k3_is_computed_only_where_it_is_asked_for(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    labels = {"estimator": "k3", "policy": "student", "task": "other"}
    with serving(pair) as live:
        stub = stub_of(live)
        every_output = "output_ids text_output logprobs k3"
        stub.ModelInfer(infer_request())
        response = stub.ModelInfer(infer_request(outputs=every_output, divergence=False))
        assert names_of(response) == every_output.split()[:3]
        assert pair.value("divergence_tokens_total", **labels) == 0
        response = stub.ModelInfer(infer_request(outputs=every_output))
        num_tokens = len(value_of(response, "k3"))
        assert num_tokens == len(value_of(response, "output_ids"))
        assert pair.value("divergence_tokens_total", **labels) == num_tokens


def test_failed_teacher_leaves_k3_out_and_says_so(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.TEACHER].error = RuntimeError("secret")
    with serving(pair) as live:
        response = stub_of(live).ModelInfer(infer_request(outputs="output_ids k3"))
    assert names_of(response) == ["output_ids"]
    assert "engine failed" in response.parameters["divergence_error"].string_param


def test_request_id_repeats_a_request_and_id_does_not(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        stub = stub_of(live)
        labels = {"role": "student", "finish_reason": "length"}
        first = stub.ModelInfer(infer_request(request_id="r", id="a", ignore_eos=True))
        again = stub.ModelInfer(infer_request(request_id="r", id="b", ignore_eos=True))
        assert pair.value("samples_total", **labels) == 1
        assert again.outputs == first.outputs and (first.id, again.id) == ("a", "b")
        for text in (b"x", b"y"):
            stub.ModelInfer(infer_request(text_input(text), id="a", ignore_eos=True))
        assert pair.value("samples_total", **labels) == 3


def test_timeout_ends_a_request(live: Any, stub: Any) -> None:
    error = failure(lambda: stub.ModelInfer(infer_request(timeout=1)))
    assert error.code() is CODE.DEADLINE_EXCEEDED
    (response,) = stub_of(live).ModelStreamInfer(iter([infer_request(timeout=1)]))
    assert response.error_message.startswith("DEADLINE_EXCEEDED: ")
    assert stub.ModelInfer(infer_request(timeout=0)) == stub.ModelInfer(infer_request())


def test_refused_field_has_its_status_and_place_over_the_wire(stub: Any) -> None:
    for settings, code, field in (
        ({"top_p": 1.5}, CODE.INVALID_ARGUMENT, "parameters[top_p]"),
        ({"max_tokens": 256}, CODE.OUT_OF_RANGE, "parameters[max_tokens]"),
    ):
        error = failure(lambda settings=settings: stub.ModelInfer(infer_request(**settings)))
        assert (error.code(), list(violations(error))) == (code, [field])


def test_requests_are_counted_once_each(serving: Any, make_pair: Any) -> None:
    pair = make_pair()

    def count(rpc: str, code: str, route: str = "student") -> float:
        return float(pair.value("requests_total", rpc=rpc, route=route, code=code, task="other"))

    with serving(pair) as live:
        stub_of(live).ModelInfer(infer_request())
        with pytest.raises(grpc.RpcError):
            stub_of(live).ModelInfer(infer_request(top_p=2.0))
        requests = [infer_request(), infer_request(model="teacher"), infer_request(beams=2)]
        list(stub_of(live).ModelStreamInfer(iter(requests)))
        assert count("ModelInfer", "OK") == 1
        assert count("ModelInfer", "INVALID_ARGUMENT", "none") == 1
        assert count("ModelStreamInfer", "OK") == count("ModelStreamInfer", "OK", "teacher") == 1
        assert count("ModelStreamInfer", "INVALID_ARGUMENT", "none") == 1
