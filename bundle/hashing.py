"""SHA-256 of files, weights and JSON values: one spelling of "the same content" for all stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bundle.model_weights import find_weights


def hash_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces (weights may exceed the memory)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the hex SHA-256 of a JSON value, whatever the order of its keys.

    NaN and infinity are a ValueError: they have no JSON spelling.

    >>> hash_json({"a": 1, "b": [2.5, None]}) == hash_json({"b": [2.5, None], "a": 1})
    True
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def hash_weights(folder: Path) -> str | None:
    """Return the hex SHA-256 of the weights that are loaded from a folder, None when it has none.

    Of one file its own hash, of several the hash over their names and hashes. ModelFolderError as
    from `bundle.model_weights.find_weights`.
    """
    hashes = {path.name: hash_file(path) for path in find_weights(folder)}
    if len(hashes) > 1:
        return hash_json(hashes)
    return next(iter(hashes.values()), None)


def list_files(folder: Path) -> Iterator[str]:
    """Yield the relative posix name of every file (and symlink) under `folder`, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()
