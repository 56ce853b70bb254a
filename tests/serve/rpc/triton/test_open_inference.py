"""The Open Inference Protocol through a real channel, over real engines and fake models."""

from __future__ import annotations

import itertools
import json
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2

from protos.oip import grpc_service_pb2 as oip
from protos.oip import grpc_service_pb2_grpc as oip_grpc
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import ContextLengthError, InvalidFieldError, TooLargeError
from serve.pair.served import Role
from serve.rpc.triton.open_inference import MAX_REQUESTS_PER_STREAM
from serve.rpc.triton.requests import to_inference

CODE = grpc.StatusCode
PROMPT = "1+1="
DTYPES = {"INT64": "<i8", "FP64": "<f8"}
FIELDS = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
InputTensor = oip.ModelInferRequest.InferInputTensor
OutputTensor = oip.ModelInferRequest.InferRequestedOutputTensor


def parameter(value: Any) -> oip.InferParameter:
    return oip.InferParameter(**{FIELDS[type(value)]: value})


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> InputTensor:
    return InputTensor(
        name=name,
        datatype=datatype,
        shape=shape,
        contents=oip.InferTensorContents(**contents) if contents else None,
    )


def text_input(text: bytes = PROMPT.encode()) -> InputTensor:
    return tensor("text_input", "BYTES", [1], bytes_contents=[text])


def infer_request(
    *inputs: InputTensor, model: str = "student", outputs: str = "", id: str = "", **settings: Any
) -> oip.ModelInferRequest:
    """A request of one text, eight tokens and a seed, unless said otherwise."""
    return oip.ModelInferRequest(
        model_name=model,
        id=id,
        inputs=inputs or [text_input()],
        outputs=[OutputTensor(name=name) for name in outputs.split()],
        parameters={k: parameter(v) for k, v in {"max_tokens": 8, "seed": 7, **settings}.items()},
    )


def value_of(response: oip.ModelInferResponse, name: str) -> Any:
    """An output as a list, or as text; None where it is absent."""
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == name and output.datatype == "BYTES":
            assert output.shape == [1] and len(raw) == 4 + int.from_bytes(raw[:4], "little")
            return raw[4:].decode()
        if output.name == name:
            values = np.frombuffer(raw, DTYPES[output.datatype]).reshape(output.shape)
            assert values.shape[0] == 1
            return values[0].tolist()
    return None


def names(response: oip.ModelInferResponse) -> list[str]:
    return [output.name for output in response.outputs]


def is_final(response: oip.ModelInferResponse) -> bool:
    return response.parameters["triton_final_response"].bool_param


def violations(error: Any) -> dict[str, str]:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    bad = error_details_pb2.BadRequest()
    (packed,) = status_pb2.Status.FromString(details).details
    assert packed.Unpack(bad)
    return {v.field: v.description for v in bad.field_violations}


def stub_of(live: Any) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(live.channel)


@pytest.fixture
def stub(live: Any) -> oip_grpc.GRPCInferenceServiceStub:
    return stub_of(live)


class Stream:
    """A stream that stays open while responses are read."""

    def __init__(self, live: Any) -> None:
        self._requests: queue.Queue[oip.ModelInferRequest | None] = queue.Queue()
        self.call = stub_of(live).ModelStreamInfer(iter(self._requests.get, None), timeout=30)

    def send(self, *requests: oip.ModelInferRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def close(self) -> None:
        self._requests.put(None)

    def read(self) -> oip.ModelStreamInferResponse:
        return next(self.call)


def stream(live: Any, *requests: oip.ModelInferRequest) -> list[oip.ModelInferResponse]:
    """All responses to requests of a stream, which succeed."""
    responses = list(stub_of(live).ModelStreamInfer(iter(requests), timeout=30))
    assert not any(response.error_message for response in responses)
    return [response.infer_response for response in responses]


def samples(live: Any, **fields: Any) -> list[pb.Sample]:
    request = pb.GenerateRequest(
        prompt=PROMPT, sampling=pb.SamplingParams(max_tokens=8, seed=7), **fields
    )
    return [e.complete.sample for e in live.client.generate(request) if e.HasField("complete")]


def eventually(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.01)


# Health and description


def test_descriptor_has_the_protocols_name() -> None:
    assert (oip.DESCRIPTOR.name, oip.DESCRIPTOR.package) == ("grpc_service.proto", "inference")


def test_server_and_models_are_ready(stub: Any) -> None:
    assert stub.ServerLive(oip.ServerLiveRequest()).live
    assert stub.ServerReady(oip.ServerReadyRequest()).ready
    for name, version in itertools.product(("student", "teacher"), ("", "1")):
        assert stub.ModelReady(oip.ModelReadyRequest(name=name, version=version)).ready
    index = stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True))
    assert [(m.name, m.version, m.state) for m in index.models] == [
        ("student", "1", "READY"),
        ("teacher", "1", "READY"),
    ]


def test_readiness_follows_the_engines(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    with serving(pair) as live:
        stub = stub_of(live)
        pair.engines.teacher.engine.stop()
        assert not stub.ServerReady(oip.ServerReadyRequest()).ready
        assert stub.ModelReady(oip.ModelReadyRequest(name="student")).ready
        assert not stub.ModelReady(oip.ModelReadyRequest(name="teacher")).ready
        assert len(stub.RepositoryIndex(oip.RepositoryIndexRequest()).models) == 2
        (ready,) = stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True)).models
        assert ready.name == "student"
        live.stop_soon().result(30)


def test_metadata_and_config_describe_the_same_tensors(stub: Any) -> None:
    metadata = stub.ModelMetadata(oip.ModelMetadataRequest(name="teacher"))
    config = stub.ModelConfig(oip.ModelConfigRequest(name="teacher")).config
    assert (metadata.name, list(metadata.versions), config.name) == ("teacher", ["1"], "teacher")
    assert {metadata.platform, config.platform, config.backend} == {"tandem"}
    assert config.max_batch_size == 0 and not config.model_transaction_policy.decoupled
    for described, configured in (
        (metadata.inputs, config.input),
        (metadata.outputs, config.output),
    ):
        assert [(t.name, t.shape) for t in described] == [(t.name, t.dims) for t in configured]
        datatypes = [oip.DataType.Name(t.data_type).removeprefix("TYPE_") for t in configured]
        assert [t.datatype.replace("BYTES", "STRING") for t in described] == datatypes
    assert [t.name for t in metadata.outputs] == ["output_ids", "text_output", "logprobs", "k3"]
    assert [t.name for t in metadata.inputs][:2] == ["input_ids", "text_input"]
    assert all(t.optional for t in config.input)


def test_server_has_a_version_and_no_extensions(stub: Any) -> None:
    metadata = stub.ServerMetadata(oip.ServerMetadataRequest())
    assert metadata.name == "tandem" and metadata.version and not metadata.extensions


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("judge", "", "model 'judge' is not known; must be one of student, teacher"),
        ("", "", "model '' is not known; must be one of student, teacher"),
        ("student", "2", "model student has no version '2'; it has 1"),
    ],
)
def test_unknown_model_is_not_found(stub: Any, name: str, version: str, text: str) -> None:
    request = oip.ModelInferRequest(model_name=name, model_version=version, inputs=[text_input()])
    for call in (
        lambda: stub.ModelReady(oip.ModelReadyRequest(name=name, version=version)),
        lambda: stub.ModelMetadata(oip.ModelMetadataRequest(name=name, version=version)),
        lambda: stub.ModelConfig(oip.ModelConfigRequest(name=name, version=version)),
        lambda: stub.ModelInfer(request),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert (caught.value.code(), caught.value.details()) == (CODE.NOT_FOUND, text)


def test_there_is_one_repository(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryIndex(oip.RepositoryIndexRequest(repository_name="other"))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert list(violations(caught.value)) == ["repository_name"]


def test_student_alone_has_no_k3_and_no_teacher(serving: Any, make_pair: Any) -> None:
    with serving(make_pair(roles=(Role.STUDENT,))) as live:
        stub = stub_of(live)
        metadata = stub.ModelMetadata(oip.ModelMetadataRequest(name="student"))
        assert "k3" not in [output.name for output in metadata.outputs]
        for request, code in (
            (infer_request(outputs="k3"), CODE.FAILED_PRECONDITION),
            (infer_request(model="teacher"), CODE.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(request)
            assert caught.value.code() is code
        assert value_of(stub.ModelInfer(infer_request()), "output_ids")


# ModelInfer


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_inference_is_what_generate_says(live: Any, stub: Any, model: str) -> None:
    route = pb.ROUTE_TEACHER if model == "teacher" else pb.ROUTE_STUDENT
    (sample,) = samples(live, route=route, divergence=pb.DivergenceOptions(per_token=True))
    outputs = "k3 logprobs output_ids text_output"
    response = stub.ModelInfer(infer_request(model=model, outputs=outputs, id="mine"))
    assert (response.model_name, response.model_version, response.id) == (model, "1", "mine")
    assert names(response) == outputs.split()
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
    assert names(responses[0]) == ["output_ids", "text_output", "logprobs"]
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
        assert names(response) == every_output.split()[:3]
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
    assert names(response) == ["output_ids"]
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
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_request(timeout=1))
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    (response,) = stub_of(live).ModelStreamInfer(iter([infer_request(timeout=1)]))
    assert response.error_message.startswith("DEADLINE_EXCEEDED: ")
    assert stub.ModelInfer(infer_request(timeout=0)) == stub.ModelInfer(infer_request())


def raw(*contents: bytes, **fields: Any) -> oip.ModelInferRequest:
    request = infer_request(**fields)
    request.raw_input_contents.extend(contents)
    return request


def with_input_parameters() -> oip.ModelInferRequest:
    request = infer_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return request


def with_output_parameters() -> oip.ModelInferRequest:
    request = infer_request(outputs="k3")
    request.outputs[0].parameters["classification"].int64_param = 3
    return request


def with_empty_parameter() -> oip.ModelInferRequest:
    request = infer_request()
    request.parameters["top_k"].SetInParent()
    return request


def ids(shape: list[int], values: list[int]) -> InputTensor:
    return tensor("input_ids", "INT64", shape, int64_contents=values)


def setting(name: str, datatype: str, shape: list[int], **contents: Any) -> oip.ModelInferRequest:
    return infer_request(text_input(), tensor(name, datatype, shape, **contents))


REFUSED = {
    "no prompt": (infer_request(tensor("top_k", "INT32", [1], int_contents=[1])),
                  "inputs[text_input]", "no prompt given; must be exactly one of input_ids and"),
    "two prompts": (infer_request(text_input(), ids([1], [5])),
                    "inputs[input_ids]", "input_ids and text_input given; must be exactly one"),
    "twice": (infer_request(text_input(), text_input()), "inputs[text_input]", "is given twice"),
    "batch": (infer_request(ids([2, 2], [5, 5, 5, 5])), "inputs[input_ids]",
              "has shape [2, 2]; must be [n] or [1, n]: a request has one prompt"),
    "scalar": (infer_request(ids([], [5])), "inputs[input_ids]", "has shape []; must be [n]"),
    "two texts": (infer_request(tensor("text_input", "BYTES", [2], bytes_contents=[b"a", b"b"])),
                  "inputs[text_input]", "has 2 texts; must have one"),
    "not UTF-8": (infer_request(text_input(b"\xff")), "inputs[text_input]", "must be UTF-8"),
    "datatype": (infer_request(tensor("input_ids", "INT32", [1], int_contents=[5])),
                 "inputs[input_ids]", "has datatype INT32; must be INT64"),
    "unknown datatype": (infer_request(tensor("input_ids", "FP16", [1])), "inputs[input_ids]",
                         "has datatype 'FP16'; must be one of BOOL, INT8"),
    "negative id": (infer_request(ids([1, 2], [5, -1])), "inputs[input_ids][1]",
                    "is -1; must be 0 to 4294967295"),
    "large id": (infer_request(ids([1], [1 << 40])), "inputs[input_ids][0]", "is 1099511627776"),
    "id beyond the vocabulary": (infer_request(ids([1, 2], [5, 259])), "inputs[input_ids][1]",
                                 "is 259; must be below 259"),
    "no ids": (infer_request(ids([1, 0], [])), "inputs[input_ids]", "is empty"),
    "empty text": (infer_request(text_input(b"")), "inputs[text_input]", "is 0 bytes"),
    "negative shape": (infer_request(ids([-1], [5])), "inputs[input_ids]", "has shape [-1]"),
    "shape of three": (infer_request(ids([1, 1, 1], [5])), "inputs[input_ids]",
                       "has shape [1, 1, 1]; must be [n] or [1, n]"),
    "huge shape": (infer_request(ids([1, 1 << 62], [5])), "inputs[input_ids]",
                   "has 1 elements; its shape [1, 4611686018427387904] needs 4611686018427387904"),
    "too many inputs": (infer_request(*[tensor(str(i), "INT32", [1]) for i in range(65)]),
                        "inputs", "has 65 tensors; must have at most 64"),
    "too many parameters": (infer_request(**{f"p{i}": 1 for i in range(30)}), "parameters",
                            "has 32 of them; there are only temperature"),
    "too many outputs": (infer_request(outputs="k3 " * 5), "outputs",
                         "has 5 of them; there are only output_ids"),
    "too few elements": (infer_request(ids([1, 3], [5])), "inputs[input_ids]",
                         "has 1 elements; its shape [1, 3] needs 3"),
    "wrong contents": (infer_request(tensor("input_ids", "INT64", [1], int_contents=[5])),
                       "inputs[input_ids].contents", "has int_contents; a INT64 tensor has int64"),
    "raw tensors": (raw(b"", b""), "raw_input_contents", "has 2 tensors; must have those of all 1"),
    "raw length": (raw(b"\5\0\0\0ab"), "inputs[text_input]", "ends within an element"),
    "raw half length": (raw(b"\5\0"), "inputs[text_input]", "ends within an element"),
    "raw texts": (raw(b"\0" * 8), "inputs[text_input]", "has more elements than its shape, 1"),
    "raw bytes": (infer_request(ids([1], [])), "inputs[input_ids]", "has 0 elements"),
    "input parameters": (with_input_parameters(), "inputs[text_input].parameters",
                         "has shared_memory_region; must be empty"),
    "output parameters": (with_output_parameters(), "outputs[k3].parameters",
                          "has classification; must be empty"),
    "unknown output": (infer_request(outputs="k3 logits"), "outputs[logits]",
                       "is not known; must be one of output_ids, text_output, logprobs, k3"),
    "unknown input": (setting("image", "BYTES", [1], bytes_contents=[b""]), "inputs[image]",
                      "is not known; must be one of input_ids, text_input, temperature"),
    "unknown parameter": (infer_request(beams=3), "parameters[beams]",
                          "is not known; must be one of temperature, top_p"),
    "parameter as tensor": (setting("timeout", "INT64", [1], int64_contents=[1]), "inputs[timeout]",
                            "is not known"),
    "empty parameter": (with_empty_parameter(), "parameters[top_k]", "is None; must be a whole"),
    "two values": (setting("top_k", "INT32", [2], int_contents=[1, 2]), "inputs[top_k]",
                   "has 2 elements; must have one"),
    "given twice": (infer_request(text_input(), tensor("top_k", "INT32", [1], int_contents=[1]),
                                  top_k=1),
                    "inputs[top_k]", "is given twice, also as parameters[top_k]"),
    "no number": (infer_request(temperature="warm"), "parameters[temperature]",
                  "is 'warm'; must be a number"),
    "flag for a number": (infer_request(temperature=True), "parameters[temperature]",
                          "is True; must be a number"),
    "huge number": (infer_request(sampling_parameters='{"temperature": 1' + "0" * 400 + "}"),
                    "parameters[sampling_parameters].temperature", "must be a number"),
    "fraction": (infer_request(max_tokens=1.5), "parameters[max_tokens]",
                 "is 1.5; must be a whole number, 0 to 4294967295"),
    "negative": (infer_request(top_k=-1), "parameters[top_k]", "is -1; must be a whole number"),
    "number for a flag": (infer_request(ignore_eos=1), "parameters[ignore_eos]",
                          "is 1; must be true or false"),
    "number for a text": (infer_request(stop=1), "parameters[stop][0]", "is 1; must be a string"),
    "stop not UTF-8": (setting("stop", "BYTES", [1], bytes_contents=[b"\xff"]), "inputs[stop][0]",
                       "must be UTF-8"),
    "half a surrogate pair": (infer_request(sampling_parameters='{"stop": ["a", "\\ud800"]}'),
                              "parameters[sampling_parameters].stop[1]",
                              "is '\\ud800'; must be UTF-8"),
    "half a pair as a name": (infer_request(sampling_parameters='{"\\ud800": 1}'),
                              "parameters[sampling_parameters].\\ud800", "is not known"),
    "no JSON": (infer_request(sampling_parameters="{"), "parameters[sampling_parameters]",
                "is not a JSON object"),
    "JSON list": (infer_request(sampling_parameters="[1]"), "parameters[sampling_parameters]",
                  "is not a JSON object"),
    "deep JSON": (infer_request(sampling_parameters="[" * 60_000),
                  "parameters[sampling_parameters]", "is not a JSON object"),
    "deep number": (infer_request(top_k="[" * 60_000), "parameters[top_k]", "must be a whole"),
    "long list": (infer_request(sampling_parameters=json.dumps({"stop": ["a"] * 257})),
                  "parameters[sampling_parameters].stop", "has 257 elements; must have at most"),
    "long JSON": (infer_request(sampling_parameters="[" * 70_000),
                  "parameters[sampling_parameters]", "has a length of 70000; must have at most"),
    "unknown in JSON": (infer_request(sampling_parameters='{"n": 2}'),
                        "parameters[sampling_parameters].n", "is not known; must be one of"),
    "stream": (infer_request(stream=True), "parameters[stream]",
               "is true; must be false in ModelInfer; ask ModelStreamInfer"),
    "ids in the output": (infer_request(ids([1], [5]), exclude_input_in_output=False),
                          "parameters[exclude_input_in_output]",
                          "is false; must be true with input_ids"),
    "bounds of a parameter": (infer_request(top_p=1.5), "parameters[top_p]",
                              "is 1.5; must be 1e-06 to 1"),
    "bounds of a tensor": (setting("min_p", "FP64", [1], fp64_contents=[2]), "inputs[min_p]",
                           "is 2.0; must be 0 to 1"),
    "bounds in JSON": (infer_request(sampling_parameters='{"temperature": NaN}'),
                       "parameters[sampling_parameters].temperature", "is nan; must be"),
    "bounds of an element": (infer_request(stop_token_ids=999), "parameters[stop_token_ids][0]",
                             "is 999; must be below 259"),
    "bounds of a default": (infer_request(request_id="\n"), "parameters[request_id]", "printable"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_field_is_named_as_it_was_given(stub: Any, name: str) -> None:
    request, field, text = REFUSED[name]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is CODE.INVALID_ARGUMENT, caught.value.details()
    found = violations(caught.value)
    assert list(found) == [field]
    assert text in found[field]
    # A list of names is cut in the details.
    assert caught.value.details().startswith(f"{field}: {found[field].removesuffix('...')}")


LONG = "\u00e4" * 10_000
CUT = LONG[:60] + "..."
LONG_TEXTS = {
    "model": (infer_request(model=LONG), f"model '{LONG[:59]}... is not known"),
    "version": (oip.ModelInferRequest(model_name="student", model_version=LONG),
                f"has no version '{LONG[:59]}...; it has 1"),
    "parameter": (infer_request(**{LONG: 1}), f"parameters[{CUT}]: is not known"),
    "value": (infer_request(temperature=LONG), f"is '{LONG[:59]}...; must be a number"),
    "input": (infer_request(tensor(LONG, "INT32", [1], int_contents=[1])),
              f"inputs[{CUT}]: is not known"),
    "input twice": (infer_request(*[tensor(LONG, "INT32", [1], int_contents=[1])] * 2),
                    f"inputs[{CUT}]: is given twice"),
    "datatype": (infer_request(tensor("input_ids", LONG, [1])),
                 f"has datatype '{LONG[:59]}...; must be one of"),
    "output": (infer_request(outputs=LONG), f"outputs[{CUT}]: is not known"),
    "JSON": (infer_request(sampling_parameters=json.dumps({LONG: 1})),
             f"parameters[sampling_parameters].{CUT}: is not known"),
    "JSON value": (infer_request(sampling_parameters=json.dumps({"top_k": [[1]] * 10_000})),
                   "is [[1], [1], "),
    "shape": (infer_request(tensor("input_ids", "INT64", [1] * 20_000)),
              f"has shape {str([1] * 60)[:60]}...; must be [n]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_texts_of_the_client_are_cut_in_errors(stub: Any, name: str) -> None:
    request, text = LONG_TEXTS[name]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() in (CODE.INVALID_ARGUMENT, CODE.NOT_FOUND), caught.value.details()
    assert text in caught.value.details()
    assert len(caught.value.details()) < 600


def test_parameters_of_a_tensor_are_cut_in_errors(stub: Any) -> None:
    for field in ("inputs", "outputs"):
        request = infer_request(outputs="k3")
        getattr(request, field)[0].parameters[LONG].int64_param = 3
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
        ((path, text),) = violations(caught.value).items()
        assert path.startswith(f"{field}[") and text == f"has {CUT}; must be empty"


def test_long_shape_is_never_multiplied() -> None:
    # The product of so many takes hours.
    request = infer_request(tensor("input_ids", "INT64", [1 << 62] * 1_000_000, int64_contents=[5]))
    with pytest.raises(InvalidFieldError, match=r"has shape \[4611686018427387904, .*\.\.\.; must"):
        to_inference(request, may_stream=False, max_elements=64)


def test_error_that_others_see_too_is_left_as_it_is() -> None:
    inference = to_inference(infer_request(), may_stream=False, max_elements=64)
    shared = ContextLengthError("sampling.max_tokens", "4 tokens exceed", 3)
    for _ in range(2):
        with (
            pytest.raises(TooLargeError, match="exceed the context of 3") as caught,
            inference.fields_as_given(),
        ):
            raise shared
        assert caught.value.field == "parameters[max_tokens]"
    assert shared.field == "sampling.max_tokens"


def test_raw_elements_have_the_size_of_their_datatype(stub: Any) -> None:
    request = infer_request(tensor("input_ids", "INT64", [1]))
    request.raw_input_contents.append(b"123")
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert violations(caught.value) == {"inputs[input_ids]": "has 3 bytes; a INT64 element takes 8"}


def test_too_long_request_is_out_of_range(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_request(max_tokens=256))
    assert caught.value.code() is CODE.OUT_OF_RANGE
    assert list(violations(caught.value)) == ["parameters[max_tokens]"]


def test_default_max_tokens_ends_with_the_context(stub: Any) -> None:
    request = infer_request(ids([1, 250], [5] * 250), ignore_eos=True)
    del request.parameters["max_tokens"]
    assert len(value_of(stub.ModelInfer(request), "output_ids")) == 6


@pytest.mark.parametrize(
    ("prompt", "field"),
    [(text_input(b"x" * 256), "text_input"), (ids([1, 256], [5] * 256), "input_ids")],
)
def test_prompt_that_fills_the_context_is_out_of_range(
    stub: Any, prompt: InputTensor, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_request(prompt, max_tokens=1))
    assert caught.value.code() is CODE.OUT_OF_RANGE
    text = "256 prompt tokens leave no room for a completion in the context of 256 tokens"
    assert violations(caught.value) == {f"inputs[{field}]": text}


@pytest.mark.parametrize("is_raw", [False, True])
def test_more_ids_than_the_context_are_out_of_range(stub: Any, is_raw: bool) -> None:
    request = infer_request(ids([1, 257], [] if is_raw else [5] * 257))
    if is_raw:
        request.raw_input_contents.append(b"\5" + b"\0" * (257 * 8 - 1))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is CODE.OUT_OF_RANGE
    text = "inputs[input_ids] has 257 elements, the context takes 256"
    assert violations(caught.value) == {"inputs[input_ids]": text}


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


# ModelStreamInfer


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_streamed_parts_add_up_to_the_whole(live: Any, stub: Any, model: str) -> None:
    outputs = "output_ids text_output logprobs k3"
    request = infer_request(model=model, outputs=outputs, id="s")
    whole = stub.ModelInfer(request)
    *parts, last = stream(live, request)
    assert len(parts) > 1 and {part.id for part in (*parts, last)} == {"s"}
    for name in ("output_ids", "logprobs"):
        assert [v for part in parts for v in value_of(part, name)] == value_of(whole, name)
        assert value_of(last, name) == []
    text = "".join(value_of(part, "text_output") for part in (*parts, last))
    assert text == value_of(whole, "text_output")
    assert value_of(last, "k3") == value_of(whole, "k3")
    assert all("k3" not in names(part) and not is_final(part) for part in parts)
    assert is_final(last) and "finish_reason" in last.parameters


@pytest.mark.parametrize(
    ("outputs", "is_streamed", "last_names"),
    [
        ("output_ids", True, [["output_ids"], []]),
        ("output_ids k3", True, [["output_ids"], ["k3"], []]),
        ("output_ids k3", False, [["output_ids", "k3"], []]),
    ],
)
def test_last_response_is_empty_if_that_is_wanted(
    live: Any, outputs: str, is_streamed: bool, last_names: list[list[str]]
) -> None:
    request = infer_request(
        outputs=outputs, id="s", stream=is_streamed, triton_enable_empty_final_response=True
    )
    responses = stream(live, request)
    assert [names(response) for response in responses][-len(last_names) :] == last_names
    assert [is_final(response) for response in responses] == [False] * (len(responses) - 1) + [True]
    assert [r.id for r in responses if "finish_reason" in r.parameters] == ["s"]
    assert responses[-1].id == "s"


def test_stream_of_whole_completions(live: Any, stub: Any) -> None:
    (response,) = stream(live, infer_request(stream=False))
    assert response.outputs == stub.ModelInfer(infer_request()).outputs
    assert value_of(response, "output_ids") and is_final(response)


def test_requests_of_a_stream_run_side_by_side(
    serving: Any, make_pair: Any, continuing_with: Callable[[str], torch.Tensor]
) -> None:
    pair = make_pair(continuing_with("abc"), continuing_with("xyz"))
    pair.backends[Role.TEACHER].may_run.clear()
    with serving(pair) as live:
        open_stream = Stream(live)
        prompt = text_input(b"?")
        open_stream.send(
            infer_request(prompt, model="teacher", id="t"), infer_request(prompt, id="s")
        )
        texts = {"s": "", "t": ""}
        while True:
            response = open_stream.read().infer_response
            texts[response.id] += value_of(response, "text_output")
            if is_final(response) and response.id == "s":
                assert texts == {"s": "abc", "t": ""}
                pair.backends[Role.TEACHER].may_run.set()
                open_stream.close()
            elif is_final(response):
                break
        assert texts == {"s": "abc", "t": "xyz"}
        assert list(open_stream.call) == []


def test_failed_requests_do_not_end_the_stream(live: Any) -> None:
    call = live.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        None,
        oip.ModelStreamInferResponse.FromString,
    )
    requests = [
        infer_request(id="beams", beams=2),
        infer_request(id="judge", model="judge"),
        infer_request(id="long", max_tokens=256),
        infer_request(id="good", stream=False),
    ]
    data = [b"\xff\xff", *(request.SerializeToString() for request in requests)]
    responses = {r.infer_response.id: r for r in call(iter(data), timeout=30)}
    errors = {id: r.error_message.partition(":")[0] for id, r in responses.items()}
    assert errors == {
        "": "INVALID_ARGUMENT",
        "beams": "INVALID_ARGUMENT",
        "judge": "NOT_FOUND",
        "long": "OUT_OF_RANGE",
        "good": "",
    }
    assert responses["beams"].error_message.startswith(
        "INVALID_ARGUMENT: parameters[beams]: is not known; must be one of"
    )
    assert all(is_final(response.infer_response) for response in responses.values())
    assert value_of(responses["good"].infer_response, "output_ids")


@pytest.fixture
def stuck(serving: Any, make_pair: Any) -> Iterator[Any]:
    """A server whose student has not begun to answer, with long answers to come."""
    pair = make_pair(max_model_len=4000, max_num_seqs=2, max_waiting=1000)
    pair.backends[Role.STUDENT].may_run.clear()
    with serving(pair) as live:
        yield live


def test_cancelled_stream_ends_all_its_requests(stuck: Any) -> None:
    open_stream, pair = Stream(stuck), stuck.pair
    requests = [infer_request(id=str(i), max_tokens=2000, ignore_eos=True) for i in range(4)]
    open_stream.send(*requests)
    engine = pair.engines.student.engine
    eventually(lambda: engine.load().num_running + engine.load().num_waiting > 0)
    open_stream.call.cancel()
    labels = {"rpc": "ModelStreamInfer", "route": "student", "code": "CANCELLED", "task": "other"}
    eventually(lambda: pair.value("requests_total", **labels) == 4)
    pair.backends[Role.STUDENT].may_run.set()
    eventually(lambda: engine.load().num_running + engine.load().num_waiting == 0)
    open_stream.close()
    assert value_of(stub_of(stuck).ModelInfer(infer_request()), "output_ids")


def test_stream_takes_only_so_many_requests_at_once(stuck: Any) -> None:
    open_stream = Stream(stuck)
    num_requests = MAX_REQUESTS_PER_STREAM + 2
    open_stream.send(*[infer_request(id=str(i), stream=False) for i in range(num_requests)])
    refused = [open_stream.read() for _ in range(2)]
    assert {r.infer_response.id for r in refused} == {"64", "65"}
    assert {r.error_message for r in refused} == {
        "RESOURCE_EXHAUSTED: 64 requests of this stream run, the most it may"
    }
    stuck.pair.backends[Role.STUDENT].may_run.set()
    done = [open_stream.read() for _ in range(MAX_REQUESTS_PER_STREAM)]
    assert not any(response.error_message for response in done)
    open_stream.send(infer_request(id="next", stream=False))
    assert open_stream.read().infer_response.id == "next"
    open_stream.close()
    assert list(open_stream.call) == []


def test_requests_of_a_stream_are_calls_of_its_client(serving: Any, make_pair: Any) -> None:
    pair = make_pair()
    pair.backends[Role.STUDENT].may_run.clear()
    with serving(pair, max_concurrent_per_peer=3) as live:
        open_stream = Stream(live)
        open_stream.send(*[infer_request(id=str(i), stream=False) for i in range(5)])
        refused = [open_stream.read() for _ in range(2)]
        assert [r.infer_response.id for r in refused] == ["3", "4"]
        assert {r.error_message for r in refused} == {
            "RESOURCE_EXHAUSTED: 3 calls of this client run, which is the limit"
        }
        with pytest.raises(grpc.RpcError) as caught:
            stub_of(live).ModelInfer(infer_request())
        assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
        pair.backends[Role.STUDENT].may_run.set()
        assert {open_stream.read().infer_response.id for _ in range(3)} == {"0", "1", "2"}
        open_stream.send(infer_request(id="next", stream=False))
        assert value_of(open_stream.read().infer_response, "output_ids")
        open_stream.close()
        labels = {"rpc": "ModelStreamInfer", "code": "RESOURCE_EXHAUSTED", "task": "other"}
        assert pair.value("requests_total", route="none", **labels) == 2


def test_stream_is_read_on_when_large_requests_have_ended(
    stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.rpc.triton.open_inference.MAX_BYTES_PER_STREAM", 1000)
    engine = stuck.pair.engines.student.engine
    open_stream = Stream(stuck)
    ids = ["0", "1" * 1000, "2", "3"]
    open_stream.send(*[infer_request(id=id, stream=False) for id in ids])
    eventually(lambda: engine.load().num_running + engine.load().num_waiting == 2)
    for _ in range(20):
        stub_of(stuck).ServerLive(oip.ServerLiveRequest())
    assert engine.load().num_running + engine.load().num_waiting == 2
    stuck.pair.backends[Role.STUDENT].may_run.set()
    assert {open_stream.read().infer_response.id for _ in range(4)} == set(ids)
    open_stream.close()


def test_stream_that_comes_when_streams_are_over_is_told(serving: Any, make_pair: Any) -> None:
    with serving(make_pair()) as live:
        live.loop.call_soon_threadsafe(live.server._open_inference.close)
        open_stream = Stream(live)
        open_stream.send(infer_request(stream=False))
        with pytest.raises(grpc.RpcError) as caught:
            open_stream.read()
        assert caught.value.code() is CODE.UNAVAILABLE
        assert caught.value.details() == "the server is draining"
        open_stream.close()


@pytest.mark.parametrize("is_busy", [False, True])
def test_drain_ends_a_stream_behind_its_last_response(
    serving: Any, make_pair: Any, is_busy: bool
) -> None:
    pair = make_pair()
    with serving(pair) as live:
        open_stream = Stream(live)
        open_stream.send(infer_request(id="first", stream=False))
        assert open_stream.read().infer_response.id == "first"
        if is_busy:
            pair.backends[Role.STUDENT].may_run.clear()
            open_stream.send(infer_request(id="last", stream=False))
            eventually(lambda: pair.engines.student.engine.load().num_running > 0)
        stopping = live.stop_soon()
        pair.backends[Role.STUDENT].may_run.set()
        if is_busy:
            assert value_of(open_stream.read().infer_response, "output_ids")
        with pytest.raises(grpc.RpcError) as caught:
            open_stream.read()
        assert caught.value.code() is CODE.UNAVAILABLE
        assert caught.value.details() == "the server is draining"
        stopping.result(60)
        open_stream.close()
