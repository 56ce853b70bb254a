"""Files of a folder that somebody else wrote: plain ones alone, and JSON read strictly.

Python's own reader takes the last of two equal keys, NaN, and any depth; here each of these is
refused, and nothing is read from a pipe, a device or a link that leaves the folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bundle.errors import ModelFolderError, one_line

# The index of weights of the largest public models has 9 MB, a tokenizer's configuration 1 MB.
MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a plain file; ModelFolderError names the file and the place."""
    check_plain_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFolderError(f"{_name(path)} cannot be read: {error.strerror}") from None
    if len(data) > MAX_JSON_BYTES:
        raise ModelFolderError(f"{_name(path)} has more than {MAX_JSON_BYTES} bytes")
    try:
        return parse_object(data)
    except ValueError as error:
        raise ModelFolderError(f"{_name(path)} {error}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`.

    ValueError ("is not JSON: ...") for what is none: no UTF-8, a key that is there twice, a number
    that is not finite, more than 64 levels, or JSON of another kind.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"is not JSON: byte {error.start} is no UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("holds no JSON object")
    if any(depth > MAX_JSON_DEPTH for depth, _ in walk(value)):
        raise ValueError(f"is nested too deeply: more than {MAX_JSON_DEPTH} levels")
    return value


def walk(value: Any) -> Iterator[tuple[int, dict[str, Any] | list[Any]]]:
    """Yield every object and list of a JSON value with its depth, the value itself at depth 1."""
    waiting = [(1, value)]
    while waiting:
        depth, part = waiting.pop()
        if isinstance(part, dict | list):
            yield depth, part
            members = part.values() if isinstance(part, dict) else part
            waiting.extend((depth + 1, member) for member in members)


def check_plain_file(path: Path) -> None:
    """Refuse what does not exist, is no regular file, or is a link that leaves its folder."""
    if not os.path.lexists(path):
        raise ModelFolderError(f"{_name(path)} does not exist")
    if path.is_symlink() and not _stays(path):
        raise ModelFolderError(f"{_name(path)} is a link that leads out of the model's folder")
    if not path.is_file():
        raise ModelFolderError(f"{_name(path)} is not a plain file")


def _stays(link: Path) -> bool:
    """Say whether a link ends in its own folder, or where Hugging Face's cache keeps contents."""
    folder, target = Path(os.path.realpath(link.parent)), Path(os.path.realpath(link))
    if target.is_relative_to(folder):
        return True
    # …/models--ORG--NAME/snapshots/COMMIT/config.json is a link to …/models--ORG--NAME/blobs/HASH.
    is_snapshot = folder.parent.name == "snapshots"
    return is_snapshot and target.parent == folder.parent.parent / "blobs"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _name(path: Path) -> str:
    return one_line(str(path))
