"""Which files of a model's folder shape its token ids or its logits, and their hashes.

JSON is hashed by its content, without what only says who wrote it, so that the same settings
written again are the same input. The weights have a hash of their own (`bundle.hashing`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from bundle.errors import ModelFolderError, one_line
from bundle.hashing import hash_json

_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_TEMPLATES = "additional_chat_templates"
_WRITER_KEYS = ("_name_or_path", "transformers_version")


def hash_model_inputs(folder: Path) -> dict[str, str]:
    """Return the hex SHA-256 of each file that is there, by its name in the folder.

    ModelFolderError when one cannot be read.
    """
    return {one_line(path.relative_to(folder).as_posix()): _hash(path) for path in _list(folder)}


def differing_inputs(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Return the names, sorted, of the files that differ or are in one folder alone.

    >>> differing_inputs({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
    ['a', 'b', 'c']
    """
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def _list(folder: Path) -> Iterator[Path]:
    for name in _NAMES:
        if (folder / name).is_file():
            yield folder / name
    yield from sorted((folder / _TEMPLATES).glob("*.jinja"))


def _hash(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFolderError(one_line(f"{path} cannot be read: {error.strerror}")) from None
    if path.suffix == ".json":
        try:
            value = json.loads(data)
            if isinstance(value, dict):
                value = {key: value[key] for key in value if key not in _WRITER_KEYS}
            return hash_json(value)
        except (ValueError, RecursionError):  # no JSON: who reads it says so
            pass
    return hashlib.sha256(data).hexdigest()
