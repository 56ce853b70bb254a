"""Whether two folders have the same tokenizer, however their files spell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from serve.text.tokenizer_files import TOKENIZER_NAME, open_tokenizer, read_tokenizer

# What makes ids of a text, by the names of tokenizer.json. Truncation and padding are dropped when
# a tokenizer is opened; special tokens around a raw text and the way back to text change no id.
_PARTS = ("normalizer", "pre_tokenizer", "added_tokens")
_CHANGES_NO_ID = "trim_offsets"


def tokenizer_difference(one: Path, other: Path) -> str | None:
    """Return the first part in which the tokenizers of two folders differ; None: they are equal.

    Compared is what the library makes of the files: the order of keys, merges as texts or as lists,
    truncation and padding make no difference. They are equal if their tokenizer.json are, or
    together with what the files beside these add.

    Raises:
        UserError: the files of a folder cannot be read.
    """
    if _difference(*(open_tokenizer(folder / TOKENIZER_NAME) for folder in (one, other))) is None:
        return None
    return _difference(*(read_tokenizer(folder).tokenizer for folder in (one, other)))


def _difference(one: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> str | None:
    vocabularies = [t.get_vocab(with_added_tokens=True) for t in (one, other)]
    if vocabularies[0] != vocabularies[1]:
        return f"vocabulary ({_first_difference(*vocabularies)})"
    ours, theirs = _state(one), _state(other)
    return next((part.replace("_", " ") for part in ours if ours[part] != theirs[part]), None)


def _state(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    state = json.loads(tokenizer.to_str(), object_hook=_without_offsets)
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = None  # compared with the added tokens; a list holds the scores, too
    return {
        "merges": model.pop("merges", None),
        "model": model,
        **{part: state[part] for part in _PARTS},
    }


def _without_offsets(value: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in value.items() if key != _CHANGES_NO_ID}


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    token, _ = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    ids = (str(ids.get(token, "missing")) for ids in (ours, theirs))
    return f"{token!r} is " + " and ".join(ids)
