"""Bytes as the message of every rpc: parsed, checked, translated; only expected errors come."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import control_pb2 as control
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import TandemError
from serve.pair.request import Limits
from serve.pair.routing import TrafficPolicy
from serve.rpc.decoding import MAX_MESSAGE_BYTES, parse
from serve.rpc.statuses import status_of
from serve.rpc.triton.models import OUTPUTS, to_role
from serve.rpc.triton.requests import to_inference
from serve.rpc.triton.settings import AS_TENSORS, PROMPTS
from serve.rpc.validation import (
    validate_abort,
    validate_compare,
    validate_generate,
    validate_score,
    validate_set_policy,
)
from tests.faults.fuzz.messages import any_message

LIMITS = Limits(max_model_len=64, vocab_size=259, tasks=frozenset({"math"}))
NUM_DRAWN = 40  # messages of each rpc by chance
# HTTP/2 trailers, of which a client takes 8 KiB by default.
MAX_TRAILER_BYTES = 8 << 10


def _infer(request: oip.ModelInferRequest, may_stream: bool) -> None:
    inference = to_inference(request, may_stream=may_stream, max_elements=64)
    with inference.fields_as_given():
        validate_generate(inference.request, LIMITS)


HANDLERS: Mapping[type[Message], Callable[[Any], object]] = {
    pb.GenerateRequest: lambda request: validate_generate(request, LIMITS),
    pb.CompareRequest: lambda request: validate_compare(request, LIMITS),
    pb.ScoreRequest: lambda request: validate_score(request, LIMITS),
    pb.GetModelsRequest: str,
    control.SetPolicyRequest: lambda request: validate_set_policy(request, TrafficPolicy()),
    control.AbortRequest: validate_abort,
    oip.ModelInferRequest: lambda request: [_infer(request, flag) for flag in (False, True)],
    oip.ModelConfigRequest: lambda request: to_role(request.name, request.version),
    oip.RepositoryIndexRequest: str,
}
TYPES = tuple(HANDLERS)


def check(data: bytes) -> None:
    """Treat the first byte as the rpc and the rest as its message; raises where something is wrong.

    What is refused must be told within what trailers carry.
    """
    if not data:
        return
    message_type = TYPES[data[0] % len(TYPES)]
    try:
        HANDLERS[message_type](parse(data[1:], message_type))
    except TandemError as error:
        status = status_of(error)
        size = len(status.message.encode()) + sum(
            len(value) for _, value in status.trailing_metadata()
        )
        assert status.code.name in ("INVALID_ARGUMENT", "OUT_OF_RANGE", "NOT_FOUND"), status
        assert size <= MAX_TRAILER_BYTES, size


def seeds() -> Iterator[bytes]:
    """Yield whole requests of each rpc, one compressed, and messages with anything in them."""
    for request in itertools.chain(_requests(), _inferences(), _mistaken()):  # some change again
        yield bytes([TYPES.index(type(request))]) + request.SerializeToString()
    yield b"\0" + gzip.compress(pb.GenerateRequest(prompt="x").SerializeToString())
    yield b"\0" + gzip.compress(b"x" * 100)[:20] + b"damaged"
    yield b"\0" + gzip.compress(bytes(MAX_MESSAGE_BYTES + 1))
    two = pb.GenerateRequest(prompt="x").SerializeToString()
    yield b"\0" + two + pb.GenerateRequest(messages=pb.ChatMessages()).SerializeToString()
    rng = random.Random(8)
    names = (*AS_TENSORS, *PROMPTS, *OUTPUTS, "student", "teacher", "user", "boxed", "math")
    texts = (*names, "1", "true", "null", "[]", '{"top_k": 5}', "", " ", "ab\n", "\u00e9", "BYTES")
    for kind in TYPES * NUM_DRAWN:
        yield bytes([TYPES.index(kind)]) + any_message(rng, kind, texts).SerializeToString()


def _inferences() -> Iterator[oip.ModelInferRequest]:
    """Yield requests that are right, or wrong in one setting, in each of the forms it may have."""
    whole: Mapping[str, Any] = {
        "INT64": [1], "INT32": [5, 6], "UINT64": [7], "FP32": [0.5], "BOOL": [True],
        "BYTES": [b"ab"],
    }  # fmt: skip
    fields = {"INT64": "int64", "INT32": "int", "UINT64": "uint64", "FP32": "fp32"}
    for name, setting in AS_TENSORS.items():
        infer = _inference()
        tensor = infer.inputs.add(name=name, datatype=setting.datatype)
        values = whole[setting.datatype][: None if setting.is_list else 1]
        tensor.shape.append(len(values))
        field = fields.get(setting.datatype, setting.datatype.lower())
        getattr(tensor.contents, f"{field}_contents").extend(values)
        yield infer
    for value in (1, -1, 1.5, "1", "x", "1e999", True, None, [], [1, "a"], ["\ud800"], {}):
        for name in AS_TENSORS:
            infer = _inference()
            text = json.dumps({name: value})
            infer.parameters["sampling_parameters"].string_param = text
            yield infer
            yield _with_parameter(name, value)
    for shape, raw in (
        ([1, 3], bytes(24)),
        ([2], b""),
        ([-1], b""),
        ([1], b"\xff"),
        ([65], bytes(520)),
    ):
        infer = oip.ModelInferRequest(model_name="student", raw_input_contents=[raw])
        infer.inputs.add(name="input_ids", datatype="INT64", shape=shape)
        yield infer
    for raw in (b"\2\0\0\0ab", b"\1\0\0\0\xff", b"\xff\0\0\0", b"\0", b"\0\0\0\0" * 2):
        infer = oip.ModelInferRequest(model_name="student", raw_input_contents=[raw])
        infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        yield infer


def _mistaken() -> Iterator[oip.ModelInferRequest]:
    """Yield requests whose parts do not fit together."""
    for name, datatype in (("text_input", "INT64"), ("input_ids", "INT64"), ("x", "BYTES")):
        infer = _inference()
        infer.inputs.add(name=name, datatype=datatype, shape=[0])
        yield infer
        del infer.inputs[0]
        yield infer
    for value in (-1, 1 << 40, 5):
        infer = oip.ModelInferRequest(model_name="teacher")
        ids = infer.inputs.add(name="input_ids", datatype="INT64", shape=[1])
        ids.contents.int64_contents.append(value)
        infer.parameters["exclude_input_in_output"].bool_param = value < 5
        yield infer
        ids.contents.bool_contents.append(True)
        yield infer
    infer = _inference()
    infer.parameters["temperature"].double_param = infer.parameters["top_p"].double_param = -1
    infer.parameters["stream"].bool_param = True
    yield infer
    for name in ("k3", "logprobs", "text_output", "output_ids", "k3"):
        infer.outputs.add(name=name)
        infer.parameters["divergence"].bool_param = False
        yield infer
    infer.parameters["stop"].string_param = "x" * 70000
    yield infer
    for number in range(70):
        infer.inputs.add(name=f"{number}", datatype="BYTES")
        infer.parameters[f"{number}"].bool_param = True
    yield infer
    infer.parameters.clear()
    yield infer
    many = _inference()
    many.parameters["sampling_parameters"].string_param = json.dumps({"stop": ["a"] * 300})
    yield many


def _inference() -> oip.ModelInferRequest:
    infer = oip.ModelInferRequest(model_name="student")
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.CopyFrom(
        oip.InferTensorContents(bytes_contents=[b"ab"])
    )
    return infer


def _with_parameter(name: str, value: object) -> oip.ModelInferRequest:
    """Return a request with a parameter; one of no such type has no value."""
    infer, kinds = _inference(), {int: "int64", float: "double", str: "string", bool: "bool"}
    parameter = infer.parameters[name]
    if isinstance(value, tuple(kinds)):
        setattr(parameter, f"{kinds[type(value)]}_param", value)
    return infer


def _requests() -> Iterator[Message]:
    """Yield a whole request of each rpc."""
    sampling = pb.SamplingParams(max_tokens=4, seed=1, stop=["ab"], top_p=0.5, stop_token_ids=[1])
    evaluation = pb.EvaluationOptions(answer_format="boxed", reference_answer="1", pass_at_k=[1])
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])
    ids = pb.TokenIds(ids=[5, 6])
    infer = oip.ModelInferRequest(model_name="student", raw_input_contents=[bytes(8)], id="x")
    infer.inputs.add(name="input_ids", datatype="INT64", shape=[1, 1])
    infer.parameters["sampling_parameters"].string_param = '{"top_k": 5, "stop": ["a"]}'
    infer.parameters["temperature"].string_param = "0.5"
    infer.outputs.add(name="k3")
    typed = oip.ModelInferRequest(model_name="teacher")
    typed.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.CopyFrom(
        oip.InferTensorContents(bytes_contents=[b"ab"])
    )
    yield from (
        pb.GenerateRequest(prompt_token_ids=ids, sampling=sampling, evaluation=evaluation, route=3),
        pb.GenerateRequest(messages=chat, output=pb.OutputOptions(top_logprobs=3)),
        pb.CompareRequest(prompt="x", sampling=sampling, request_id="x"),
        pb.ScoreRequest(prompt="x", completions=[pb.Completion(token_ids=ids)], roles=[1, 2]),
        control.SetPolicyRequest(student_weight=1, expected_revision=0),
        control.SetPolicyRequest(student_weight=0, teacher_weight=0),
        control.AbortRequest(request_id="x"),
        pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[5] * 65)),
        pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(stop_token_ids=[5] * 300)),
        pb.ScoreRequest(prompt="x", roles=[1, 1], temperature=2, completions=[pb.Completion()]),
        infer,
        typed,
        oip.ModelConfigRequest(name="student", version="1"),
    )
