"""Compressed messages over a real channel, and bombs."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from protos.tandem.v1 import inference_pb2 as pb
from serve.rpc.decoding import (
    MAX_MESSAGE_BYTES,
    MalformedMessageError,
    decompress,
    decompress_or_keep,
    parse,
)

REQUEST = pb.GenerateRequest(prompt="x" * 200, sampling=pb.SamplingParams(max_tokens=2, seed=1))
PLAIN = REQUEST.SerializeToString()
BOMB = bytes(MAX_MESSAGE_BYTES + 1)


@pytest.mark.parametrize("data", [PLAIN, gzip.compress(PLAIN), zlib.compress(PLAIN), b"", b"\x78"])
def test_plain_gzip_and_deflate_are_the_same_message(data: bytes) -> None:
    assert decompress(data) in (PLAIN, data)
    if len(data) > 1:
        assert parse(data, pb.GenerateRequest) == REQUEST


@pytest.mark.parametrize(
    "data", [gzip.compress(PLAIN)[:-1], gzip.compress(PLAIN)[:20] + b"x", b"\x78\x9c\xff\xff\xff"]
)
def test_half_or_damaged_compression_is_left_to_the_parser(data: bytes) -> None:
    assert decompress(data) == data
    with pytest.raises(MalformedMessageError):
        parse(data, pb.GenerateRequest)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_bomb_takes_no_more_than_a_message_may(compress: Any) -> None:
    bomb = compress(bytes(100 << 20))
    tracemalloc.start()
    with pytest.raises(MalformedMessageError, match="more than 4194304 bytes when decompressed"):
        decompress(bomb)
    assert decompress_or_keep(bomb) == bomb
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * MAX_MESSAGE_BYTES


@pytest.mark.parametrize("kind", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_clients_may_compress_calls_of_every_service(live: Any, kind: grpc.Compression) -> None:
    (complete,) = [
        event.complete
        for event in live.stub.Generate(REQUEST, compression=kind, timeout=30)
        if event.HasField("complete")
    ]
    assert complete.sample.token_ids
    check = live.channel.unary_unary("/grpc.health.v1.Health/Check")
    name = health_pb2.HealthCheckRequest(service="no such" * 50).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        check(name, compression=kind, timeout=30)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_bomb_over_a_channel_is_refused(live: Any) -> None:
    generate = live.channel.unary_stream("/tandem.v1.InferenceService/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        list(generate(BOMB, compression=grpc.Compression.Gzip, timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request has more than 4194304 bytes when decompressed"
