"""Bytes of a message: what stands in them before they are parsed, and compressed ones."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from protos.oip import grpc_service_pb2 as oip
from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError
from serve.rpc.decoding import (
    MAX_FIELDS,
    MAX_LIST_BYTES,
    MAX_MESSAGE_BYTES,
    MalformedMessageError,
    decompress,
    decompress_or_keep,
    parse,
    scan,
)
from tests.support.rpc.calls import failure

GENERATE, SCORE = pb.GenerateRequest.DESCRIPTOR, pb.ScoreRequest.DESCRIPTOR


def test_numbers_are_those_of_the_fields_set() -> None:
    request = pb.ScoreRequest(
        request_id="x" * 300,
        prompt="é",
        completions=[pb.Completion(text="a"), pb.Completion(text="b" * 1000)],
        temperature=0.5,
        divergence=pb.DivergenceOptions(enabled=True),
    )
    assert scan(request.SerializeToString(), SCORE) == {1, 3, 6, 8, 9}


def test_every_wire_type_is_skipped() -> None:
    data = b"\x08\x01" + b"\x15abcd" + b"\x19abcdefgh" + b"\x22\x00" + b"\xf8\x07\x80\x01"
    assert scan(data, GENERATE) == {1, 2, 3, 4, 127}


def within(number: int, data: bytes) -> bytes:
    """Return a field that holds a message."""
    size, length = len(data), b""
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def test_as_many_fields_as_are_allowed_are_parsed() -> None:
    stop = b"\x4a\x00" * (MAX_FIELDS - 1)
    assert len(parse(within(6, stop), pb.GenerateRequest).sampling.stop) == MAX_FIELDS - 1


@pytest.mark.parametrize(
    ("message_type", "data", "path"),
    [
        (pb.GenerateRequest, b"\x0a\x00" * (MAX_FIELDS + 1), "request_id"),
        (pb.GenerateRequest, within(6, b"\x4a\x00" * MAX_FIELDS), "sampling.stop"),
        (pb.CompareRequest, within(4, b"\x0a\x02\x0a\x00" * MAX_FIELDS), "messages.messages.role"),
        (pb.ScoreRequest, within(7, b"\x01" * (MAX_LIST_BYTES + 1)), "roles"),
        (oip.ModelInferRequest, b"\x22\x00" * (MAX_FIELDS + 1), "parameters"),
        (oip.ModelInferRequest, within(5, within(3, b"\x01" * (2 << 20))), "inputs.shape"),
    ],
)
def test_floods_are_refused_by_path(message_type: Any, data: bytes, path: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        parse(data, message_type)
    assert [violation.field for violation in caught.value.violations] == [path]


@pytest.mark.parametrize(
    "data",
    [
        b"\x0b\x0c",
        within(6, b"\x0b\x0c"),
        b"\x78\x01" * (MAX_FIELDS + 1),
        b"\x7a\x00" * (MAX_FIELDS + 1),
    ],
)
def test_groups_and_floods_of_unknown_fields_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        parse(data, pb.GenerateRequest)


@pytest.mark.parametrize(
    "data", [b"\x80", b"\x0a", b"\x0a\x02x", b"\x08", b"\x09abc", b"\x08" + b"\xff" * 11]
)
def test_bytes_that_end_within_a_field_are_no_message(data: bytes) -> None:
    with pytest.raises(MalformedMessageError, match=r"not a valid tandem\.v1\.Gen"):
        scan(data, GENERATE)


@pytest.mark.parametrize(
    ("message_type", "data"),
    [
        (pb.GenerateRequest, b"\x0a\x00" * (2 << 20)),
        (pb.GetModelsRequest, b"\x0a\x00" * (2 << 20)),
        (pb.GenerateRequest, within(6, b"\x4a\x00" * (1 << 20))),
        (oip.ModelInferRequest, b"".join(within(4, within(1, b"%d" % n)) for n in range(200_000))),
    ],
)
def test_flood_is_not_read_to_its_end(message_type: Any, data: bytes) -> None:
    class Counted(bytes):
        num_reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.num_reads += 1
            return super().__getitem__(index)

    counted = Counted(data)
    with pytest.raises((MalformedMessageError, InvalidFieldError)):
        parse(counted, message_type)
    assert 0 < counted.num_reads < 10 * MAX_FIELDS


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x05ab", b"\x1a\x02\xff\xfe"])
def test_malformed_bytes_and_bad_utf8_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError, match=r"not a valid tandem\.v1\.GenerateRequest"):
        parse(data, pb.GenerateRequest)


def test_members_of_a_oneof_are_found_together() -> None:
    data = pb.CompareRequest(prompt="x").SerializeToString()
    data += pb.CompareRequest(messages=pb.ChatMessages()).SerializeToString()
    with pytest.raises(InvalidFieldError, match="prompt and messages are given together"):
        parse(data, pb.CompareRequest)


# Compressed messages

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
    error = failure(lambda: check(name, compression=kind, timeout=30))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_bomb_over_a_channel_is_refused(live: Any) -> None:
    generate = live.channel.unary_stream("/tandem.v1.InferenceService/Generate")
    call = generate(BOMB, compression=grpc.Compression.Gzip, timeout=30)
    error = failure(lambda: list(call))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request has more than 4194304 bytes when decompressed"
