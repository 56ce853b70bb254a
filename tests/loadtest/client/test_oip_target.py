from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bundle.errors import UserError
from loadtest.client.oip_target import OipTarget
from loadtest.client.targets import RequestFailedError
from loadtest.config import RunConfig
from loadtest.records import DatasetPrompt, RequestRecord
from protos.oip import grpc_service_pb2 as oip
from protos.oip import grpc_service_pb2_grpc as oip_grpc
from tests.support.load_tests import planned
from tests.support.rpc.listening import listening

PROMPTS = {
    "sum": DatasetPrompt("sum", "2 + 2 =", reference_answer="4", answer_format="last_number"),
    "long": DatasetPrompt("long", "Once", max_tokens=4, ignore_eos=True),
    "odd": DatasetPrompt("odd", "?", answer_format="house_style"),
}
Tensor = oip.ModelMetadataResponse.TensorMetadata
Reply = oip.ModelStreamInferResponse
VLLM = {
    "text_input": [1],
    "stream": [1],
    "sampling_parameters": [1],
    "exclude_input_in_output": [1],
}
BATCHED = {"text_input": [-1, 1], "stream": [-1, 1], "max_tokens": [-1, 1]}


def reply(
    text: bytes = b"", ids: list[int] | None = None, *, id: str = "0", is_final: bool = False,
    is_raw: bool = True, reason: str = "",
) -> Reply:  # fmt: skip
    response = oip.ModelInferResponse(id=id)
    response.parameters["triton_final_response"].bool_param = is_final
    if reason:
        response.parameters["finish_reason"].string_param = reason
    if text:
        output = response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        if is_raw:
            response.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
        else:
            output.contents.bytes_contents.append(text)
    if ids is not None:
        output = response.outputs.add(name="output_ids", datatype="INT32", shape=[1, len(ids)])
        if is_raw:
            response.raw_output_contents.append(np.array(ids, "<i4").tobytes())
        else:
            output.contents.int_contents.extend(ids)
    return Reply(infer_response=response)


class Scripted(oip_grpc.GRPCInferenceServiceServicer):
    """A server of one model `gpt`: replies when all inferences of a stream are there."""

    def __init__(
        self,
        replies: Iterable[Reply | threading.Event | grpc.StatusCode] = (),
        inputs: dict[str, list[int]] = VLLM,
        outputs: tuple[str, ...] = ("text_output",),
    ) -> None:
        self.replies, self.inputs, self.outputs = list(replies), inputs, outputs
        self.requests: list[oip.ModelInferRequest] = []

    def ModelMetadata(self, request: Any, context: Any) -> oip.ModelMetadataResponse:  # noqa: N802
        if request.name != "gpt":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}, but gpt")
        types = {"text_output": "BYTES", "output_ids": "INT32", "logits": "FP32"}
        return oip.ModelMetadataResponse(
            inputs=[Tensor(name=name, shape=shape) for name, shape in self.inputs.items()],
            outputs=[Tensor(name=name, datatype=types[name]) for name in self.outputs],
        )

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Reply]:  # noqa: N802
        self.requests += requests
        for each in self.replies:
            if isinstance(each, grpc.StatusCode):
                context.abort(each, "not now")
            elif isinstance(each, threading.Event):
                each.wait()
            else:
                yield each


def serving(service: Scripted) -> AbstractContextManager[str]:
    return listening(service, oip_grpc.add_GRPCInferenceServiceServicer_to_server)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


def config_of(target: str, **settings: Any) -> RunConfig:
    given = {"arms": ("gpt",), "protocol": "oip", "timeout_s": 60, **settings}
    return RunConfig(target=target, out=Path("unused"), **given)


async def exchange(
    config: RunConfig, prompts: tuple[str, ...] = ("sum",)
) -> tuple[RequestRecord, RequestFailedError | None]:
    """Check the server and send it one request of seed 7; each look at the clock is a second."""
    plan = planned(arm="gpt", prompt_id=prompts[0], seed=7)
    record, ticks = RequestRecord(plan, sent_s=0.0), itertools.count(1.0)
    target = OipTarget(config, {name: PROMPTS[name] for name in prompts})
    try:
        await target.check()
        await target.send(record, lambda: next(ticks))
    except RequestFailedError as failed:
        return record, failed
    finally:
        await target.close()
    return record, None


@pytest.mark.parametrize("is_raw", [True, False])
def test_tokens_texts_and_answer_are_recorded(run: Any, is_raw: bool) -> None:
    replies = [
        reply("½".encode()[:1], [5], is_raw=is_raw),
        reply("½".encode()[1:] + b" = 4", [6, 7], is_raw=is_raw, reason="stop"),
        reply(is_final=True),
    ]
    with serving(Scripted(replies, outputs=("text_output", "output_ids"))) as target:
        record, failed = run(exchange(config_of(target)))
    assert failed is None
    (sample,) = record.samples
    assert (sample.token_ids, sample.text, sample.finish_reason) == ([5, 6, 7], "½ = 4", "STOP")
    assert (sample.answer, sample.is_correct) == ("4", True)
    assert sample.token_times_s == [1, 2, 2]


def test_without_ids_each_text_counts_as_a_token(run: Any) -> None:
    with serving(Scripted([reply(b"= "), reply(b"5"), reply(is_final=True)])) as target:
        record, failed = run(exchange(config_of(target)))
    (sample,) = record.samples
    assert failed is None
    assert (len(sample.token_times_s), sample.token_ids) == (2, [])
    assert (sample.answer, sample.is_correct) == ("5", False)


def test_samples_are_inferences_of_one_stream(run: Any) -> None:
    replies = [reply(b"4", id="1"), reply(b"3"), reply(is_final=True)]
    service = Scripted([*replies, reply(id="1", is_final=True)])
    with serving(service) as target:
        record, failed = run(exchange(config_of(target, num_samples=2)))
    assert failed is None
    assert [(s.index, s.text, s.is_correct) for s in record.samples] == [
        (0, "3", False),
        (1, "4", True),
    ]
    assert [request.id for request in service.requests] == ["0", "1"]


def test_settings_go_where_the_model_takes_them(run: Any) -> None:
    in_json, as_parameters = Scripted(), Scripted(inputs=BATCHED)
    for service in (in_json, as_parameters):
        with serving(service) as target:
            run(exchange(config_of(target, max_tokens=9, temperature=0.5)))
    tensors = {tensor.name: tensor for tensor in in_json.requests[0].inputs}
    assert set(tensors) == set(VLLM)
    assert tensors["stream"].contents.bool_contents == [True]
    assert tensors["sampling_parameters"].contents.bytes_contents == [
        b'{"max_tokens": 9, "temperature": 0.5, "seed": 7}'
    ]
    (request,) = as_parameters.requests
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("text_input", [1, 1]),
        ("stream", [1, 1]),
    ]
    assert request.parameters["max_tokens"].int64_param == 9
    assert request.parameters["temperature"].double_param == 0.5
    assert "ignore_eos" not in request.parameters
    assert request.parameters["triton_enable_empty_final_response"].bool_param


def test_lengths_of_a_prompt_are_kept(run: Any) -> None:
    service = Scripted(inputs=BATCHED)
    with serving(service) as target:
        run(exchange(config_of(target), ("long",)))
    parameters = service.requests[0].parameters
    assert parameters["max_tokens"].int64_param == 4
    assert parameters["ignore_eos"].bool_param


@pytest.mark.parametrize(
    ("replies", "status", "text"),
    [
        ([reply(b"4")], "INCOMPLETE", "the stream ended without the last response of 1"),
        ([Reply(error_message="RESOURCE_EXHAUSTED: full")], "RESOURCE_EXHAUSTED", "full"),
        ([Reply(error_message="in ensemble: oops")], "UNKNOWN", "in ensemble: oops"),
        ([reply(b"4", id="x")], "UNKNOWN", "a response came with the id 'x'"),
        ([reply(b"4", id="1")], "UNKNOWN", "a response came with the id '1'"),
        ([grpc.StatusCode.UNAVAILABLE], "UNAVAILABLE", "not now"),
    ],
)
def test_failures_are_told_apart(run: Any, replies: Any, status: str, text: str) -> None:
    with serving(Scripted(replies)) as target:
        _, failed = run(exchange(config_of(target)))
    assert (failed.status, failed.text) == (status, text)


def test_deadline_is_the_configured_one(run: Any) -> None:
    is_over = threading.Event()
    with serving(Scripted([is_over])) as target:
        _, failed = run(exchange(config_of(target, timeout_s=0.3)))
        is_over.set()
    assert failed.status == "DEADLINE_EXCEEDED"


def test_model_must_be_there(run: Any) -> None:
    with (
        serving(Scripted()) as target,
        pytest.raises(UserError, match=r"--arms bert at .*NOT_FOUND: no model bert, but gpt"),
    ):
        run(exchange(config_of(target, arms=("bert",))))


def test_model_must_be_one_of_text(run: Any) -> None:
    service = Scripted(inputs={"pixels": [3]}, outputs=("logits",))
    with (
        serving(service) as target,
        pytest.raises(UserError, match="takes pixels and returns logits; must take text_input"),
    ):
        run(exchange(config_of(target)))


def test_answers_must_be_ones_that_the_client_finds(run: Any) -> None:
    with pytest.raises(
        UserError, match=r"odd has answer_format 'house_style'.*must be one of none"
    ):
        run(exchange(config_of("127.0.0.1:1"), ("sum", "odd")))
