"""ModelStreamInfer of the Open Inference Protocol through a real channel, over fake models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from protos.oip import grpc_service_pb2 as oip
from protos.oip import grpc_service_pb2_grpc as oip_grpc
from serve.pair.request import Limits
from serve.pair.served import Role
from serve.rpc.calls import CallGuard
from serve.rpc.triton.open_inference import MAX_REQUESTS_PER_STREAM, OpenInferenceService
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure
from tests.support.rpc.oip import (
    Stream,
    infer_request,
    is_final,
    names_of,
    stream,
    stub_of,
    text_input,
    value_of,
)

CODE = grpc.StatusCode


@pytest.fixture
def stub(live: Any) -> Any:
    return stub_of(live)


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
    assert all("k3" not in names_of(part) and not is_final(part) for part in parts)
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
    assert [names_of(response) for response in responses][-len(last_names) :] == last_names
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
        open_stream = Stream(stub_of(live))
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
    open_stream, pair = Stream(stub_of(stuck)), stuck.pair
    requests = [infer_request(id=str(i), max_tokens=2000, ignore_eos=True) for i in range(4)]
    open_stream.send(*requests)
    engine = pair.engines.student.engine
    wait_until(lambda: engine.load().num_running + engine.load().num_waiting > 0)
    open_stream.call.cancel()
    labels = {"rpc": "ModelStreamInfer", "route": "student", "code": "CANCELLED", "task": "other"}
    wait_until(lambda: pair.value("requests_total", **labels) == 4)
    pair.backends[Role.STUDENT].may_run.set()
    wait_until(lambda: engine.load().num_running + engine.load().num_waiting == 0)
    open_stream.close()
    assert value_of(stub_of(stuck).ModelInfer(infer_request()), "output_ids")


def test_stream_takes_only_so_many_requests_at_once(stuck: Any) -> None:
    open_stream = Stream(stub_of(stuck))
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
        open_stream = Stream(stub_of(live))
        open_stream.send(*[infer_request(id=str(i), stream=False) for i in range(5)])
        refused = [open_stream.read() for _ in range(2)]
        assert [r.infer_response.id for r in refused] == ["3", "4"]
        assert {r.error_message for r in refused} == {
            "RESOURCE_EXHAUSTED: 3 calls of this client run, which is the limit"
        }
        assert (
            failure(lambda: stub_of(live).ModelInfer(infer_request())).code()
            is CODE.RESOURCE_EXHAUSTED
        )
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
    open_stream = Stream(stub_of(stuck))
    ids = ["0", "1" * 1000, "2", "3"]
    open_stream.send(*[infer_request(id=id, stream=False) for id in ids])
    wait_until(lambda: engine.load().num_running + engine.load().num_waiting == 2)
    for _ in range(20):
        stub_of(stuck).ServerLive(oip.ServerLiveRequest())
    assert engine.load().num_running + engine.load().num_waiting == 2
    stuck.pair.backends[Role.STUDENT].may_run.set()
    assert {open_stream.read().infer_response.id for _ in range(4)} == set(ids)
    open_stream.close()


def test_stream_that_comes_when_streams_are_over_is_told(
    loop: asyncio.AbstractEventLoop, make_pair: Any
) -> None:
    pair = make_pair()
    coordinator = SimpleNamespace(engines=pair.engines, limits=Limits(256, 259))
    guard = CallGuard(pair.metrics, max_timeout_s=30)
    service: Any = OpenInferenceService(None, coordinator, guard, "1", dict)  # type: ignore[arg-type]
    service.close()

    async def ask() -> Any:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = oip_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
        await server.stop(0)
        return caught.value

    error = asyncio.run_coroutine_threadsafe(ask(), loop).result(30)
    assert (error.code(), error.details()) == (CODE.UNAVAILABLE, "the server is draining")


@pytest.mark.parametrize("is_busy", [False, True])
def test_drain_ends_a_stream_behind_its_last_response(
    serving: Any, make_pair: Any, is_busy: bool
) -> None:
    pair = make_pair()
    with serving(pair) as live:
        open_stream = Stream(stub_of(live))
        open_stream.send(infer_request(id="first", stream=False))
        assert open_stream.read().infer_response.id == "first"
        if is_busy:
            pair.backends[Role.STUDENT].may_run.clear()
            open_stream.send(infer_request(id="last", stream=False))
            wait_until(lambda: pair.engines.student.engine.load().num_running > 0)
        stopping = live.stop_soon()
        pair.backends[Role.STUDENT].may_run.set()
        if is_busy:
            assert value_of(open_stream.read().infer_response, "output_ids")
        error = failure(open_stream.read)
        assert (error.code(), error.details()) == (CODE.UNAVAILABLE, "the server is draining")
        stopping.result(60)
        open_stream.close()
