"""The wire format of protobuf, as far as a parsed message does not show it any more."""

from __future__ import annotations

from collections.abc import Iterator

from serve.errors import TandemError

# Fields on the top level of a message; no request of ours has nearly as many.
MAX_FIELDS = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class MalformedMessageError(TandemError):
    """The bytes received are not a message of the expected type."""


def field_numbers(data: bytes) -> Iterator[int]:
    """Yield the number of each field on the top level of a message that could be parsed.

    Raises:
        MalformedMessageError: it has more than `MAX_FIELDS`, or a group, which proto3 has not.

    Source: protobuf.dev, "Encoding".

    >>> list(field_numbers(b"\\x08\\x96\\x01\\x12\\x07testing\\x08\\x01"))
    [1, 2, 1]
    """
    position, count = 0, 0
    while position < len(data):
        count += 1
        if count > MAX_FIELDS:
            raise MalformedMessageError(f"the request has more than {MAX_FIELDS} fields")
        tag, position = _read_varint(data, position)
        yield tag >> 3
        position = _skip(data, position, tag & 7)


def _skip(data: bytes, position: int, wire_type: int) -> int:
    """Return where the value that begins at `position` ends."""
    if wire_type == _VARINT:
        return _read_varint(data, position)[1]
    if wire_type == _BYTES:
        size, start = _read_varint(data, position)
        return start + size
    if wire_type not in (_FIXED64, _FIXED32):
        raise MalformedMessageError("the request has a group, which this protocol does not have")
    return position + (8 if wire_type == _FIXED64 else 4)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer of seven bits a byte, least significant first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
