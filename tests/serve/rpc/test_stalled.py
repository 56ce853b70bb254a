"""Streams whose clients do not read: they end, and cost nobody else anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.oip import grpc_service_pb2_grpc as oip_grpc
from protos.tandem.v1 import inference_pb2 as pb
from protos.tandem.v1 import inference_pb2_grpc
from tests.support.polling import wait_until
from tests.support.rpc.calls import failure
from tests.support.rpc.oip import Stream, infer_request, text_input

LONG = pb.SamplingParams(num_samples=8, max_tokens=200, ignore_eos=True)
REQUEST = pb.GenerateRequest(
    prompt="x",
    route=pb.ROUTE_STUDENT,
    sampling=LONG,
    output=pb.OutputOptions(top_logprobs=20),
)
# Windows that do not grow: the answer is many times as long.
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1 << 14), ("grpc.http2.bdp_probe", 0))


@pytest.fixture
def stalling(serving: Any, make_pair: Any) -> Iterator[Any]:
    """A server that waits 0.3 s for a client, and a channel with little room."""
    pair = make_pair(max_model_len=1000)
    with (
        serving(pair, max_stall_s=0.3) as live,
        grpc.insecure_channel(live.server.address, SMALL_WINDOW) as channel,
    ):
        live.small_channel = channel
        yield live


def ended(live: Any, rpc: str, code: str) -> float:
    return float(
        live.pair.value("requests_total", rpc=rpc, route="student", code=code, task="other")
    )


def generate(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(REQUEST)


def infer(channel: grpc.Channel) -> Any:
    stream = Stream(oip_grpc.GRPCInferenceServiceStub(channel), timeout_s=60)
    stream.send(infer_request(text_input(b"x"), max_tokens=900, ignore_eos=True))
    stream.call.add_callback(stream.close)
    return stream.call


@pytest.mark.parametrize(("rpc", "call"), [("Generate", generate), ("ModelStreamInfer", infer)])
def test_stream_that_nobody_reads_is_ended(stalling: Any, rpc: str, call: Any) -> None:
    responses = call(stalling.small_channel)
    wait_until(lambda: ended(stalling, rpc, "DEADLINE_EXCEEDED") == 1)
    error = failure(lambda: list(responses))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "the client took none of its responses for 0.3 s"


def test_slow_reader_gets_all(serving: Any, make_pair: Any) -> None:
    """It reads on when the answer is made, but sooner than it would be stalled."""
    pair = make_pair(max_model_len=1000)
    with (
        serving(pair, max_stall_s=3600) as live,
        grpc.insecure_channel(live.server.address, SMALL_WINDOW) as channel,
    ):
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(REQUEST)
        events = [next(call)]
        made = {"role": "student", "finish_reason": "length"}
        wait_until(lambda: pair.value("samples_total", **made) == 8)
        events += call
    assert events[-1].HasField("usage")
    assert sum(event.HasField("complete") for event in events) == 8


def test_client_that_leaves_a_full_window_has_cancelled(
    serving: Any, make_pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(make_pair(max_model_len=1000)) as live,
        grpc.insecure_channel(live.server.address, SMALL_WINDOW) as channel,
    ):
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(REQUEST)
        made = {"role": "student", "finish_reason": "length"}
        wait_until(lambda: live.pair.value("samples_total", **made) == 8)
        assert ended(live, "Generate", "OK") == 0
        call.cancel()
        wait_until(lambda: ended(live, "Generate", "CANCELLED") == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
