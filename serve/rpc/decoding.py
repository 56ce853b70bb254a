"""Bytes in, messages out, within bounds: `parse` is what every handler calls first.

gRPC decompresses whatever comes and looks at the size then: 1 MiB of gzip took a server 1 GiB. With
`grpc.per_message_decompression` off it hands over the bytes as they came, without saying so.

A parser makes an object of every element, and two bytes are one: it took 4 MiB of them 0.1 s of the
event loop. So messages are bounded on their bytes, before they are parsed; and of several members
of one oneof, of which a parser keeps the last, the bytes alone show all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from serve.errors import FieldViolation, InvalidFieldError, TandemError

AnyMessage = TypeVar("AnyMessage", bound=Message)

MAX_MESSAGE_BYTES = 4 << 20

# Fields of a message and of those within it; no request of ours has nearly as many.
MAX_FIELDS = 4096
# Of one list of numbers; an id of a prompt takes 1 to 5.
MAX_LIST_BYTES = 1 << 20

_GZIP, _ZLIB = b"\x1f\x8b", b"\x78"
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NO_LIST = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


class MalformedMessageError(TandemError):
    """The bytes received are not a message of the expected type."""

    @classmethod
    def of(cls, descriptor: Any) -> MalformedMessageError:
        return cls(f"the request is not a valid {descriptor.full_name}")


def parse(data: bytes, message_type: type[AnyMessage]) -> AnyMessage:
    """Parse a request.

    Raises:
        MalformedMessageError: not a message of this type, text that is not UTF-8, or more than a
            message may have when decompressed.
        InvalidFieldError: there is too much to parse; or several members of one oneof were sent, of
            which a parser keeps the last.
    """
    data = decompress(data)
    present = scan(data, message_type.DESCRIPTOR)
    try:
        message = message_type.FromString(data)
    except DecodeError:
        raise MalformedMessageError.of(message_type.DESCRIPTOR) from None
    _check_oneofs(present, message)
    return message


def _check_oneofs(present: frozenset[int], message: Message) -> None:
    """Refuse several members of one oneof, by the numbers of all fields that came."""
    for oneof in message.DESCRIPTOR.oneofs:
        given = [field.name for field in oneof.fields if field.number in present]
        if len(given) > 1:
            text = f"{' and '.join(given)} are given together; must be exactly one of them"
            raise InvalidFieldError(*(FieldViolation(name, text) for name in given))


def decompress(data: bytes) -> bytes:
    """Return a message as it was before the client compressed it, if it did: gzip or deflate.

    No message is taken for compressed by chance: both formats end with a checksum, and no field's
    tag begins as gzip does.

    Raises:
        MalformedMessageError: it has more than `MAX_MESSAGE_BYTES`.
    """
    if not data.startswith((_GZIP, _ZLIB)):
        return data
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = decoder.decompress(data, MAX_MESSAGE_BYTES + 1)
    except zlib.error:
        return data
    if len(plain) > MAX_MESSAGE_BYTES:
        raise MalformedMessageError(
            f"the request has more than {MAX_MESSAGE_BYTES} bytes when decompressed"
        )
    return plain if decoder.eof else data


def decompress_or_keep(data: bytes) -> bytes:
    """Do as `decompress`, but leave what is too large as it is, which no parser takes."""
    try:
        return decompress(data)
    except MalformedMessageError:
        return data


def scan(data: bytes, descriptor: Any) -> frozenset[int]:
    """Return the numbers of the fields on the top level of a message that is safe to parse.

    Whether it is one of that type is left to the parser.

    Raises:
        InvalidFieldError: a list of numbers has more than `MAX_LIST_BYTES`, or the message more
            than `MAX_FIELDS`, those of messages in it included; names the first one too many.
        MalformedMessageError: the first one too many is not known; there is a group, which proto3
            has not; or the bytes end within a field.

    Source: protobuf.dev, "Encoding".

    >>> from google.protobuf.any_pb2 import Any
    >>> sorted(scan(b"\\x0a\\x01x\\x12\\x07testing\\x0a\\x01y", Any.DESCRIPTOR))
    [1, 2]
    """
    return frozenset(_Scan(data, descriptor).numbers(0, len(data), descriptor, ""))


class _Field(NamedTuple):
    """A known field that has a length: its name, and the type of the messages in it or None."""

    name: str
    message: Any
    is_list: bool


@cache
def _fields_of(descriptor: Any) -> Mapping[int, _Field]:
    return {
        field.number: _Field(
            field.name,
            field.message_type,
            field.message_type is None and field.type not in _NO_LIST,
        )
        for field in descriptor.fields
    }


class _Scan:
    """One walk through the bytes of a message; counts the fields that it meets."""

    def __init__(self, data: bytes, descriptor: Any) -> None:
        self._data = data
        self._descriptor = descriptor
        self._num_fields = 0

    def numbers(self, position: int, end: int, descriptor: Any, path: str) -> set[int]:
        """Return the numbers of the fields of a message; `path` leads there."""
        fields, found = _fields_of(descriptor), set[int]()
        while position < end:
            tag, position = self._varint(position, end)
            found.add(tag >> 3)
            field = fields.get(tag >> 3)
            self._count(field, path)
            start, position = self._value(position, end, tag & 7)
            if field is None or tag & 7 != _BYTES or start == position:
                continue
            if field.message is not None:
                self.numbers(start, position, field.message, f"{path}{field.name}.")
            elif field.is_list and position - start > MAX_LIST_BYTES:
                raise InvalidFieldError.of(
                    path + field.name,
                    f"has {position - start} bytes; must have at most {MAX_LIST_BYTES}",
                )
        return found

    def _count(self, field: _Field | None, path: str) -> None:
        self._num_fields += 1
        if self._num_fields <= MAX_FIELDS:
            return
        text = f"the request has more than {MAX_FIELDS} fields"
        if field is None:
            raise MalformedMessageError(text)
        raise InvalidFieldError.of(path + field.name, f"is one too many: {text}")

    def _value(self, position: int, end: int, wire_type: int) -> tuple[int, int]:
        """Return where the value behind a tag begins, and where it ends."""
        start = position
        if wire_type == _VARINT:
            position = self._varint(position, end)[1]
        elif wire_type == _BYTES:
            size, start = self._varint(position, end)
            position = start + size
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise MalformedMessageError(
                "the request has a group, which this protocol does not have"
            )
        if position > end:
            raise MalformedMessageError.of(self._descriptor)
        return start, position

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """Return an integer of seven bits a byte, least significant first, and where it ends."""
        value = shift = 0
        while position < end and shift < 70:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise MalformedMessageError.of(self._descriptor)
