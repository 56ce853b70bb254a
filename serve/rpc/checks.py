"""Collecting what is wrong with a message, so that all of it is told at once, by path."""

from __future__ import annotations

import enum
from typing import Any, TypeVar

from google.protobuf.message import Message

from serve.errors import FieldViolation, InvalidFieldError
from serve.pair.request import Range

AnyEnum = TypeVar("AnyEnum", bound=enum.Enum)

# Status details travel in HTTP/2 trailers, of which a client takes 8 KiB by default.
_MAX_VIOLATIONS = 16
MAX_SHOWN_CHARS = 60


class Checks:
    """Collects what is refused, and stands in a default for it so that checking can go on."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def refuse(self, field: str, value: object, allowed: str) -> None:
        self._violations.append(FieldViolation(field, f"is {shown(value)}; must be {allowed}"))

    def raise_if_any(self) -> None:
        if self._violations:
            raise InvalidFieldError(*self._violations[:_MAX_VIOLATIONS])

    def number(
        self, message: Message, path: str, allowed: Range, default: Any, note: str = ""
    ) -> Any:
        """Return the optional number at the end of `path`, or `default` when it is unset."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return default
        value = getattr(message, name)
        if allowed.allows(value):
            return value
        self.refuse(path, value, f"{allowed}{note}")
        return default

    def enum(self, message: Message, path: str, kind: type[AnyEnum], default: AnyEnum) -> AnyEnum:
        """Return our enum for the message's; both name their members alike, 0 is the default."""
        field = message.DESCRIPTOR.fields_by_name[path.rpartition(".")[2]]
        value = getattr(message, field.name)
        return default if value == 0 else self.enum_value(field, path, value, kind, default)

    def enum_value(
        self, field: Any, path: str, value: int, kind: type[AnyEnum], default: AnyEnum
    ) -> AnyEnum:
        known = {
            item.number: member
            for item in field.enum_type.values
            for member in kind
            if item.name.endswith(f"_{member.name}")
        }
        if value not in known:
            names = [item.name for item in field.enum_type.values if item.number in known]
            self.refuse(path, value, f"one of {', '.join(names)}")
        return known.get(value, default)

    def size(self, field: str, size: int, allowed: Range, unit: str) -> bool:
        """Say whether a length is allowed, and refuse it if not."""
        if not allowed.allows(size):
            self.refuse(field, f"{size} {unit}", f"{allowed} {unit}")
        return allowed.allows(size)


def shown(value: object) -> str:
    """Return a value as it goes into an error: cut to what fits into one, and valid Unicode.

    >>> shown("x" * 1000)[-12:], shown(float("nan")), shown("\\ud800")
    ('xxxxxxxxx...', 'nan', '\\\\ud800')
    """
    text = value if isinstance(value, str) else repr(value)
    if len(text) > MAX_SHOWN_CHARS:
        text = f"{text[:MAX_SHOWN_CHARS]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def quoted(text: str) -> str:
    """Return a client's text in quotes, cut before it is escaped: it may have millions.

    >>> quoted("a\\n"), quoted("x" * 1000)[-12:]
    ("'a\\\\n'", 'xxxxxxxxx...')
    """
    return shown(repr(text[: MAX_SHOWN_CHARS + 1]))
