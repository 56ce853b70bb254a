"""Special tokens of a tokenizer: what files beside tokenizer.json add, as transformers reads them.

A token is given by its name alone, or as an object with `content` and the flags of tokenizer.json
(`{"__type": "AddedToken", "content": "<s>", "lstrip": false, ...}`). The reference is transformers
4.57; each of its classes has defaults and habits of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from bundle.errors import ModelFolderError, one_line

ADDITIONAL, EXTRA = "additional_special_tokens", "extra_special_tokens"
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
GENERAL_CLASS = "PreTrainedTokenizerFast"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

SpecialToken: TypeAlias = str | AddedToken | list[str | AddedToken]
"""One by name, one with flags, or the list of `additional_special_tokens`."""


@dataclass(frozen=True)
class TokenizerClass:
    """What a tokenizer class of transformers adds to the files."""

    tokens: Mapping[str, str | None]
    adds_bos: bool | None = None
    """Whether BOS comes before a text unless the files say otherwise; None: tokenizer.json says."""
    adds_space: bool | None = False
    """The same of a space before a text that is cut into bytes."""
    resets_flags: bool = False
    """Whether a special token of which only the name is given loses flags of tokenizer.json."""


_END = "<|endoftext|>"
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GEMMA = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_COHERE = {
    "unk_token": "<UNK>",
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
}
CLASSES = {
    "LlamaTokenizer": TokenizerClass(_LLAMA, adds_bos=True, adds_space=None),
    "CodeLlamaTokenizer": TokenizerClass(_LLAMA, adds_bos=True),
    "GemmaTokenizer": TokenizerClass(_GEMMA, adds_bos=True),
    "CohereTokenizer": TokenizerClass(_COHERE, adds_bos=True),
    "GPTNeoXTokenizer": TokenizerClass(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}, adds_bos=False
    ),
    "GPT2Tokenizer": TokenizerClass({"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    "Qwen2Tokenizer": TokenizerClass(
        {"unk_token": _END, "eos_token": _END, "pad_token": _END}, resets_flags=True
    ),
}
CLASS_OF_MODEL = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


def read_added_tokens(
    path: Path,
    config: Mapping[str, Any],
    older: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer,
) -> list[AddedToken]:
    """Return the added tokens by their ids: those that tokenizer_config.json at `path` lists.

    Where it lists none, those of tokenizer.json and of `older`, an added_tokens.json.
    """
    entries = config.get("added_tokens_decoder")
    known: dict[int, AddedToken] = {}
    if entries is None:
        known = tokenizer.get_added_tokens_decoder()
        special = [_content(config.get(key)) for key in NAMES]
        special += map(_content, as_list(config.get(ADDITIONAL)))
        entries = {
            str(token_id): {"content": text, "special": text in special}
            for text, token_id in older.items()
        }
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        raise _error(f"{path}: added tokens must be an object, of token ids and tokens")
    tokens = {int(key): _token(path, key, value) for key, value in entries.items()} | known
    return [
        AddedToken(token, normalized=True) if isinstance(token, str) else token
        for _, token in sorted(tokens.items())
    ]


def read_special_tokens(
    path: Path,
    config: Mapping[str, Any],
    defaults: TokenizerClass,
    tokenizer: tokenizers.Tokenizer,
    added: list[AddedToken],
) -> dict[str, SpecialToken]:
    """Return the special tokens by their names, without those that are null or empty."""
    by_content = {token.content: token for token in added}
    given = {key: config[key] for key in NAMES if key in config} | config[EXTRA]
    for key, value in given.items():
        if value is not None and value != "":
            token = _token(path, key, value)
            given[key] = by_content.get(_content(token), token) if key in NAMES else token
    # transformers would add a default that the vocabulary lacks; no model has a row for it.
    known = {
        key: token
        for key, token in defaults.tokens.items()
        if token is None or tokenizer.token_to_id(token) is not None
    }
    given = known | given
    if defaults.resets_flags:
        names = {key: token for key, token in given.items() if isinstance(token, str)}
        given |= {key: AddedToken(name, normalized=False) for key, name in names.items()}
    if tokenizer.padding is not None:
        given.setdefault("pad_token", tokenizer.padding["pad_token"])
    additional = [_token(path, ADDITIONAL, value) for value in as_list(config.get(ADDITIONAL))]
    ordered = dict.fromkeys(NAMES) | {ADDITIONAL: additional} | given
    return {key: value for key, value in ordered.items() if value}


def contents_of(special: Mapping[str, SpecialToken]) -> dict[str, str | list[str]]:
    """Return the special tokens as a chat template gets them."""
    return {
        key: [_content(token) for token in value] if isinstance(value, list) else _content(value)
        for key, value in special.items()
    }


def as_list(value: Any) -> list[Any]:
    """Return a value that may be missing or null as the list that it should be."""
    return value if isinstance(value, list) else []


def _content(value: Any) -> Any:
    if isinstance(value, AddedToken):
        return value.content
    return value.get("content") if isinstance(value, dict) else value


def _token(path: Path, key: str, value: Any) -> str | AddedToken:
    """Return a token by name alone, or with the flags of an object that has `content`."""
    if isinstance(value, str):
        return value
    content = _content(value)
    flags = {k: v for k, v in value.items() if k in _FLAGS} if isinstance(value, dict) else {}
    if not isinstance(content, str) or not all(isinstance(v, bool) for v in flags.values()):
        raise _error(f"{path}: {key} must be a text, or an object with content: {value!r}")
    return AddedToken(content, **flags)


def _error(text: str) -> ModelFolderError:
    return ModelFolderError(one_line(text))


# -- what the files change in the tokenizer -------------------------------------------------------


def add_tokens(
    tokenizer: tokenizers.Tokenizer, added: list[AddedToken], special: Mapping[str, SpecialToken]
) -> None:
    """Add what tokenizer.json lacks; a token that it has gets the flags that an object states."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in added}
    named: dict[str, str | AddedToken] = {}
    for value in special.values():
        for token in value if isinstance(value, list) else [value]:
            named.setdefault(_content(token), token)
    tokens = list(added)
    for name, token in named.items():
        if isinstance(token, str):
            if name in known:
                continue
            token = AddedToken(name, normalized=False)
        token.special = True
        tokens.append(token)
    for token in added:
        token.special |= token.content in named
    tokenizer.add_tokens(tokens)


def set_prefix_space(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], defaults: TokenizerClass
) -> None:
    """Let a pre-tokenizer on bytes put a space before a text, or not."""
    is_wanted = config.get("add_prefix_space", defaults.adds_space)
    before = tokenizer.pre_tokenizer
    if isinstance(before, pre_tokenizers.ByteLevel) and isinstance(is_wanted, bool):
        before.add_prefix_space = is_wanted
        tokenizer.pre_tokenizer = before


def set_post_processor(
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    defaults: TokenizerClass,
    special: Mapping[str, Any],
) -> None:
    """Put BOS and EOS around a raw text as the configuration and the class say.

    Of other classes than Llama's and its like, tokenizer.json says it.
    """
    if defaults.adds_bos is None:
        return
    around: list[list[tuple[str, int | None]]] = []
    for name, default in (("bos", defaults.adds_bos), ("eos", False)):
        token = special.get(f"{name}_token")
        default = default and (token is not None or f"{name}_token" in config)
        is_added = bool(config.get(f"add_{name}_token", default))
        if is_added and token is None:
            raise _error(f"{path}: add_{name}_token without a {name}_token")
        around.append([(str(token), tokenizer.token_to_id(str(token)))] if is_added else [])
    bos, eos = around
    pieces = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=[*bos, *eos]
        )
    except ValueError as error:
        raise _error(f"{path}: {pieces} cannot be put around a text: {error}") from None
