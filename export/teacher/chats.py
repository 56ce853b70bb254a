"""Chats of a data set: lists of messages, each with a role and content."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from bundle.errors import one_line
from export.teacher.tasks import Turn

_ROLES = ("system", "user", "assistant")


class Number(str):
    """A number of JSON as it is spelled."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns up to the user's last one; `has_answer`: an assistant's behind it is left out."""

    turns: tuple[Turn, ...]
    has_answer: bool


def read_chat(name: str, value: Any) -> Chat:
    """Return the chat in the column `name`; ValueError names the message and what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: is {reprlib.repr(value)}, not a list of messages")
    turns = [_turn(f"{name}.{index}", turn) for index, turn in enumerate(value)]
    has_answer = turns[-1][0] == "assistant"
    if has_answer:
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"{name}: has no user's turn at its end, or before an assistant's")
    return Chat(tuple(turns), has_answer)


def _turn(name: str, value: Any) -> Turn:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: is {reprlib.repr(value)}, not a role and content")
    others = [key for key in value if key not in ("role", "content") and value[key]]
    if others:
        raise ValueError(f"{name}.{one_line(others[0])}: is not supported; role and content are")
    role, content = value.get("role"), _joined(value.get("content"))
    if role not in _ROLES:
        raise ValueError(f"{name}.role: is {reprlib.repr(role)}; valid: {', '.join(_ROLES)}")
    if content is None:
        raise ValueError(f"{name}.content: is {reprlib.repr(value.get('content'))}, not text")
    if role == "user" and not content.strip():
        raise ValueError(f"{name}.content: is empty")
    return role, content


def _joined(content: Any) -> str | None:
    """Return a turn's text, which may come in parts; None where it is something else."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        is_text = all(isinstance(part, str) for part in parts)
        return "".join(map(str, parts)) if is_text else None
    return content if isinstance(content, str) and not isinstance(content, Number) else None
