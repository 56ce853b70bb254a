"""The ids of a model's EOS, BOS and pad tokens, in every form in which they are saved.

`generation_config.json` comes before `config.json`: it is what the model's makers generate with,
and has the ends of a turn where the configuration has the end of a text (Llama-3.2: 128001, 128008
and 128009). Where both are silent, the tokens that the tokenizer names are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import ModelFolderError, one_line
from bundle.json_files import check_plain_file, read_object

GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
_CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Any of `eos`, in the file's order, ends a completion; empty or None: the model has none."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int | None


def read_token_ids(folder: Path, vocab_size: int | None = None) -> TokenIds:
    """Return the ids of a model's folder.

    ModelFolderError for a value that is no token id below `vocab_size`. A pad id that is none (-1,
    or behind the vocabulary) is no pad: nothing is padded here.
    """
    configs = {
        name: read_object(folder / name)
        for name in (GENERATION_CONFIG_NAME, _CONFIG_NAME)
        if (folder / name).exists()
    }
    eos = _first(configs, "eos_token_id")
    if eos is not None:
        ids = _checked_eos(folder / eos[0], eos[1], vocab_size)
    else:
        ids = _eos_of_tokenizer(folder)
    bos = _first(configs, "bos_token_id")
    if bos is not None and not _is_id(bos[1], vocab_size):
        raise _refusal(folder / bos[0], "bos_token_id", bos[1], "no token id", vocab_size)
    pad = _first(configs, "pad_token_id")
    if pad is not None and type(pad[1]) is not int:
        raise _refusal(folder / pad[0], "pad_token_id", pad[1], "no token id", vocab_size)
    has_pad = pad is not None and _is_id(pad[1], vocab_size)
    return TokenIds(ids, bos[1] if bos else None, pad[1] if pad and has_pad else None)


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """Return the ids that end a completion; ModelFolderError without one: none would ever end."""
    eos = read_token_ids(folder).eos
    if not eos:
        raise ModelFolderError(
            f"{folder}: neither generation_config.json nor config.json has eos_token_id, and the "
            "tokenizer names no eos_token: no completion would ever end"
        )
    return frozenset(eos)


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Return ids as configurations spell them.

    >>> one_or_list((2,)), one_or_list((2, 5)), one_or_list(())
    (2, [2, 5], None)
    """
    return ids[0] if len(ids) == 1 else list(ids) or None


def token_text(value: Any) -> str | None:
    """Return the text of a special token, which files hold as text or as an object.

    >>> token_text("</s>"), token_text({"content": "</s>", "lstrip": False}), token_text(None)
    ('</s>', '</s>', None)
    """
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _first(configs: Mapping[str, Mapping[str, Any]], key: str) -> tuple[str, Any] | None:
    for name, config in configs.items():
        if config.get(key) is not None:
            return name, config[key]
    return None


def _checked_eos(path: Path, value: Any, vocab_size: int | None) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(_is_id(token_id, vocab_size) for token_id in listed):
        what = "neither a token id nor a list of them"
        raise _refusal(path, "eos_token_id", value, what, vocab_size)
    return tuple(dict.fromkeys(listed))


def _is_id(value: Any, vocab_size: int | None) -> bool:
    return type(value) is int and 0 <= value < (vocab_size or 1 << 31)


def _refusal(
    path: Path, key: str, value: Any, what: str, vocab_size: int | None
) -> ModelFolderError:
    limit = "" if vocab_size is None else f" (vocab_size is {vocab_size})"
    return ModelFolderError(one_line(f"{path}: {key} {value!r} is {what}{limit}"))


def _eos_of_tokenizer(folder: Path) -> tuple[int, ...]:
    """Return the id of the `eos_token` that a tokenizer's files name; empty where they do not."""
    for name in (TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME):
        path = folder / name
        text = token_text(read_object(path).get("eos_token")) if path.exists() else None
        if text is None:
            continue
        token_id = _id_of(folder, text)
        if token_id is None:
            raise ModelFolderError(
                one_line(f"{path}: eos_token {text!r} is no token of tokenizer.json")
            )
        return (token_id,)
    return ()


def _id_of(folder: Path, text: str) -> int | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    check_plain_file(path)
    try:
        token_id: int | None = Tokenizer.from_file(str(path)).token_to_id(text)
    except Exception as error:  # it has no other kind
        raise ModelFolderError(one_line(f"{path} cannot be read: {error}")) from None
    return token_id
