"""What stands in the bytes of a message that could be parsed."""

from __future__ import annotations

import time

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import InvalidFieldError
from serve.validation import parse
from serve.wire import MAX_FIELDS, MalformedMessageError, field_numbers


def test_numbers_are_those_of_the_fields_set() -> None:
    request = pb.ScoreRequest(
        request_id="x" * 300,
        prompt="é",
        completions=[pb.Completion(text="a"), pb.Completion(text="b" * 1000)],
        temperature=0.5,
        divergence=pb.DivergenceOptions(enabled=True),
    )
    assert sorted(field_numbers(request.SerializeToString())) == [1, 3, 6, 6, 8, 9]


def test_every_wire_type_is_skipped() -> None:
    data = b"\x08\x01" + b"\x15abcd" + b"\x19abcdefgh" + b"\x22\x02ab" + b"\xf8\x07\x80\x01"
    assert list(field_numbers(data)) == [1, 2, 3, 4, 127]


@pytest.mark.parametrize("data", [b"\x0b\x0c", b"\x18\x01" * (MAX_FIELDS + 1)])
def test_groups_and_floods_of_fields_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        parse(data, pb.GenerateRequest)


def test_flood_of_fields_takes_no_time() -> None:
    data = b"\x0a\x00" * (2 << 20)  # 4 MiB of empty request ids
    started_s = time.process_time()
    with pytest.raises(MalformedMessageError):
        parse(data, pb.GenerateRequest)
    parse(data, pb.GetModelsRequest)
    assert time.process_time() - started_s < 1


def test_members_of_a_oneof_are_found_together() -> None:
    data = pb.CompareRequest(prompt="x").SerializeToString()
    data += pb.CompareRequest(messages=pb.ChatMessages()).SerializeToString()
    with pytest.raises(InvalidFieldError, match="prompt and messages are given together"):
        parse(data, pb.CompareRequest)
