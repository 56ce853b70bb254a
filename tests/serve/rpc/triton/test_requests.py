"""Requests of the Open Inference Protocol in our terms: every field that can be wrong, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from protos.oip import grpc_service_pb2 as oip
from serve.errors import (
    ContextLengthError,
    InvalidFieldError,
    ModelNotLoadedError,
    TooLargeError,
    TooManyTokensError,
)
from serve.pair.request import Limits
from serve.rpc.triton.requests import to_inference
from serve.rpc.validation import validate_generate
from tests.support.rpc.oip import InputTensor, ids, infer_request, tensor, text_input

LIMITS = Limits(max_model_len=256, vocab_size=259)


def check(request: oip.ModelInferRequest) -> None:
    """Translate and check a request, as the service does."""
    inference = to_inference(request, may_stream=False, max_elements=LIMITS.max_model_len)
    with inference.fields_as_given():
        validate_generate(inference.request, LIMITS)


def violations(request: oip.ModelInferRequest) -> dict[str, str]:
    with pytest.raises(InvalidFieldError) as caught:
        check(request)
    return {violation.field: violation.description for violation in caught.value.violations}


def raw(*contents: bytes, inputs: Sequence[InputTensor] = ()) -> oip.ModelInferRequest:
    request = infer_request(*inputs)
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
    "raw elements of another size": (raw(b"123", inputs=[tensor("input_ids", "INT64", [1])]),
                                     "inputs[input_ids]", "has 3 bytes; a INT64 element takes 8"),
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
def test_refused_field_is_named_as_it_was_given(name: str) -> None:
    request, field, text = REFUSED[name]
    found = violations(request)
    assert list(found) == [field] and text in found[field]


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
def test_texts_of_the_client_are_cut_in_errors(name: str) -> None:
    request, text = LONG_TEXTS[name]
    with pytest.raises((InvalidFieldError, ModelNotLoadedError)) as caught:
        check(request)
    assert text in str(caught.value) and len(str(caught.value)) < 600


def test_parameters_of_a_tensor_are_cut_in_errors() -> None:
    for field in ("inputs", "outputs"):
        request = infer_request(outputs="k3")
        getattr(request, field)[0].parameters[LONG].int64_param = 3
        ((path, text),) = violations(request).items()
        assert path.startswith(f"{field}[") and text == f"has {CUT}; must be empty"


def test_long_shape_is_never_multiplied() -> None:
    # The product of so many takes hours.
    request = infer_request(tensor("input_ids", "INT64", [1 << 62] * 1_000_000, int64_contents=[5]))
    with pytest.raises(InvalidFieldError, match=r"has shape \[4611686018427387904, .*\.\.\.; must"):
        to_inference(request, may_stream=False, max_elements=64)


@pytest.mark.parametrize("is_raw", [False, True])
def test_more_ids_than_the_context_are_too_many(is_raw: bool) -> None:
    request = infer_request(ids([1, 257], [] if is_raw else [5] * 257))
    if is_raw:
        request.raw_input_contents.append(b"\5" + b"\0" * (257 * 8 - 1))
    with pytest.raises(TooManyTokensError) as caught:
        check(request)
    assert caught.value.field == "inputs[input_ids]"
    assert str(caught.value) == "inputs[input_ids] has 257 elements, the context takes 256"


@pytest.mark.parametrize(
    ("request_", "field", "given"),
    [
        (infer_request(), "sampling.max_tokens", "parameters[max_tokens]"),
        (infer_request(), "prompt", "inputs[text_input]"),
        (infer_request(ids([1], [5])), "prompt_token_ids.ids", "inputs[input_ids]"),
    ],
)
def test_error_that_others_see_too_is_left_as_it_is(
    request_: oip.ModelInferRequest, field: str, given: str
) -> None:
    inference = to_inference(request_, may_stream=False, max_elements=64)
    shared = ContextLengthError(field, "4 tokens exceed", 3)
    for _ in range(2):
        with (
            pytest.raises(TooLargeError, match="exceed the context of 3") as caught,
            inference.fields_as_given(),
        ):
            raise shared
        assert caught.value.field == given
    assert shared.field == field
