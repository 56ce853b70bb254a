"""Messages of any kind with values that lie at the edge of what is allowed, by chance of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_FLOATS = (0.0, 0.5, 1.0, -1.0, 1e-9, 1e300, float("nan"), float("inf"))
_WHOLE = (0, 1, 2, 5, 63, 64, 65, 258, 259, 2**31 - 1)
_MAX_REPEATED, _MAX_DEPTH = 4, 5
_FIELD_SHARE = 0.4


def any_message(
    rng: random.Random, kind: type[Message], texts: Sequence[str], depth: int = 0
) -> Any:
    """Return a message with some of its fields set; text and bytes are mostly of `texts`."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() > _FIELD_SHARE or depth > _MAX_DEPTH:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            _fill_map(rng, getattr(message, field.name), field.message_type, texts, depth)
        elif field.is_repeated:
            values = [_value(rng, field, texts, depth) for _ in range(rng.randrange(_MAX_REPEATED))]
            getattr(message, field.name).extend(values)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(_value(rng, field, texts, depth))
        else:
            setattr(message, field.name, _value(rng, field, texts, depth))
    return message


def _fill_map(rng: random.Random, found: Any, entry: Any, texts: Sequence[str], depth: int) -> None:
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    for _ in range(rng.randrange(_MAX_REPEATED)):
        if value.message_type:
            found[_value(rng, key, texts, depth)].CopyFrom(_value(rng, value, texts, depth))
        else:
            found[_value(rng, key, texts, depth)] = _value(rng, value, texts, depth)


def _value(rng: random.Random, field: FieldDescriptor, texts: Sequence[str], depth: int) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            kind: Any = field.message_type._concrete_class
            return any_message(rng, kind, texts, depth + 1)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.randrange(5)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(texts) * rng.choice((1, 1, 1, 1, 30))
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    return rng.choice(_WHOLE)
