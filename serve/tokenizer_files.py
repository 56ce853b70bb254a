"""The tokenizer of a model's folder, as transformers' fast tokenizers open it.

    tokenizer.json             vocabulary, merges, pre-tokenizer, added tokens
    tokenizer_config.json      special tokens, class, templates; in the spelling of versions 4 and 5
    special_tokens_map.json, added_tokens.json    where the former lists no `added_tokens_decoder`
    config.json                the class, where tokenizer_config.json names none
    chat_template.jinja, additional_chat_templates/*.jinja    before the configuration's templates
    chat_template.json         the template, where there is no other

Truncation and padding of tokenizer.json are a trainer's and dropped. The reference is transformers
4.57 (`PreTrainedTokenizerFast`, `from_pretrained`), but for two things: what it converts from a
sentencepiece model (`add_prefix_space` of Llama's class) is taken from tokenizer.json here; and a
special token that only a class of transformers names is not added to a vocabulary without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from bundle.errors import UserError, one_line

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
_ADDITIONAL, _EXTRA = "additional_special_tokens", "extra_special_tokens"
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMES = tuple(f"{name}_token" for name in _SPECIAL_TOKENS)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


_Special: TypeAlias = str | AddedToken | list[str | AddedToken]


@dataclass(frozen=True)
class _Class:
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
_CLASSES = {
    "LlamaTokenizer": _Class(_LLAMA, adds_bos=True, adds_space=None),
    "CodeLlamaTokenizer": _Class(_LLAMA, adds_bos=True),
    "GemmaTokenizer": _Class(_GEMMA, adds_bos=True),
    "CohereTokenizer": _Class(_COHERE, adds_bos=True),
    "GPTNeoXTokenizer": _Class(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}, adds_bos=False
    ),
    "GPT2Tokenizer": _Class({"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    "Qwen2Tokenizer": _Class(
        {"unk_token": _END, "eos_token": _END, "pad_token": _END}, resets_flags=True
    ),
}
_GENERAL_CLASS = "PreTrainedTokenizerFast"
_CLASS_OF_MODEL = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a folder say, in one form."""

    tokenizer: tokenizers.Tokenizer
    special_tokens: dict[str, Any]
    """What a chat template may name: strings, and a list as `additional_special_tokens`."""
    templates: dict[str, str]
    """Chat templates by name; a single one is "default"."""


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a `tokenizer.json`, which neither cuts texts nor pads them.

    Raises:
        UserError: it is missing or none.
    """
    tokenizer = _parse(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read the files of a folder.

    Raises:
        UserError: a file is missing, is no JSON or has a value of another form than is known.
    """
    tokenizer = _parse(folder / TOKENIZER_NAME)
    config = _read_config(folder)
    kind = _CLASSES.get(tokenizer_class(folder, config).removesuffix("Fast"), _Class({}))
    added = _added_tokens(folder, config, tokenizer)
    special = _special_tokens(folder, config, kind, tokenizer, added)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, added, special)
    _set_prefix_space(tokenizer, config.get("add_prefix_space", kind.adds_space))
    named = {key: _contents(value) for key, value in special.items()}
    if kind.adds_bos is not None:
        _set_post_processor(folder, tokenizer, config, kind.adds_bos, named)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return TokenizerFiles(tokenizer, named, read_templates(folder, config))


def read_templates(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return a folder's chat templates by name; `config` is its tokenizer_config.json, if read."""
    if config is None:
        config = _read_object(folder / CONFIG_NAME)
    templates = {
        path.stem: _read_text(path) for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    }
    if (folder / TEMPLATE_NAME).exists():
        templates[DEFAULT_TEMPLATE] = _read_text(folder / TEMPLATE_NAME)
    if templates:
        return templates
    given = config.get("chat_template")
    if given is None:
        given = _read_object(folder / "chat_template.json").get("chat_template")
    return _templates_by_name(folder / CONFIG_NAME, given)


def _templates_by_name(path: Path, given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT_TEMPLATE: given}
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    if not isinstance(given, dict) or not all(
        isinstance(t, str) for kv in given.items() for t in kv
    ):
        raise UserError(
            f"{path}: chat_template must be a text, or a list of objects with name and template"
        )
    return dict(given)


def tokenizer_class(folder: Path, config: Mapping[str, Any] | None = None) -> str:
    """Return transformers' class of a folder's tokenizer; `config` as in `read_templates`."""
    name = (_read_object(folder / CONFIG_NAME) if config is None else config).get("tokenizer_class")
    if name is None:
        model = _read_object(folder / "config.json")
        name = model.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(model.get("model_type")))
    return _GENERAL_CLASS if name is None else str(name)


# -- reading --------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(one_line(f"{path} cannot be read: {error}")) from None


def _parse(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no other kind of error
        raise UserError(one_line(f"{path} is damaged: {error}")) from None


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is no such file."""
    if not path.exists():
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(one_line(f"{path} is no JSON: {error}")) from None
    if not isinstance(value, dict):
        raise UserError(one_line(f"{path} must be a JSON object, not {type(value).__name__}"))
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with version 5's names replaced by version 4's."""
    config = _read_object(folder / CONFIG_NAME)
    if "added_tokens_decoder" not in config:
        older = _read_object(folder / "special_tokens_map.json")
        config |= {key: older[key] for key in _NAMES if key in older}
        listed = _listed(config.get(_ADDITIONAL))
        config[_ADDITIONAL] = listed + [
            t for t in _listed(older.get(_ADDITIONAL)) if t not in listed
        ]
    extra = config.get("extra_special_tokens") or {}
    if isinstance(extra, list):
        config[_ADDITIONAL] = _listed(config.get(_ADDITIONAL)) + extra
        extra = {}
    named = config.get("model_specific_special_tokens") or {}
    if not isinstance(extra, dict) or not isinstance(named, dict):
        raise UserError(
            one_line(f"{folder / CONFIG_NAME}: extra special tokens must be a list or an object")
        )
    return {**config, _EXTRA: {**extra, **named}}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _added_tokens(
    folder: Path, config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer
) -> list[AddedToken]:
    """Return the added tokens as the files beside tokenizer.json list them, by their ids."""
    path, listed = folder / CONFIG_NAME, config.get("added_tokens_decoder")
    known: dict[int, AddedToken] = {}
    if listed is None:
        path, known = folder / "added_tokens.json", tokenizer.get_added_tokens_decoder()
        special = [_content(config.get(key)) for key in _NAMES]
        special += map(_content, _listed(config.get(_ADDITIONAL)))
        listed = {
            str(token_id): {"content": text, "special": text in special}
            for text, token_id in _read_object(path).items()
        }
    if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
        raise UserError(
            one_line(f"{path}: added tokens must be an object, of token ids and tokens")
        )
    tokens = {int(key): _token(path, key, value) for key, value in listed.items()} | known
    return [
        AddedToken(token, normalized=True) if isinstance(token, str) else token
        for _, token in sorted(tokens.items())
    ]


def _special_tokens(
    folder: Path,
    config: Mapping[str, Any],
    kind: _Class,
    tokenizer: tokenizers.Tokenizer,
    added: list[AddedToken],
) -> dict[str, _Special]:
    """Return the special tokens by their names, without those that are null or empty."""
    given = {key: config[key] for key in _NAMES if key in config} | config[_EXTRA]
    listed = {token.content: token for token in added}
    path = folder / CONFIG_NAME
    for key, value in given.items():
        if value is not None and value != "":
            token = _token(path, key, value)
            given[key] = listed.get(_content(token), token) if key in _NAMES else token
    # transformers would add a default that the vocabulary lacks; no model has a row for it.
    known = {
        key: token
        for key, token in kind.tokens.items()
        if token is None or tokenizer.token_to_id(token) is not None
    }
    given = {**known, **given}
    if kind.resets_flags:
        given |= {
            k: AddedToken(t, normalized=False) for k, t in given.items() if isinstance(t, str)
        }
    if tokenizer.padding is not None:
        given.setdefault("pad_token", tokenizer.padding["pad_token"])
    additional = [_token(path, _ADDITIONAL, value) for value in _listed(config.get(_ADDITIONAL))]
    ordered = dict.fromkeys(_NAMES) | {_ADDITIONAL: additional} | given
    return {key: value for key, value in ordered.items() if value}


def _content(value: Any) -> Any:
    if isinstance(value, AddedToken):
        return value.content
    return value.get("content") if isinstance(value, dict) else value


def _contents(value: _Special) -> str | list[str]:
    return [_content(token) for token in value] if isinstance(value, list) else _content(value)


def _token(path: Path, key: str, value: Any) -> str | AddedToken:
    """Return a token by name alone, or with the flags of an object that has `content`."""
    if isinstance(value, str):
        return value
    content = _content(value)
    flags = {k: v for k, v in value.items() if k in _FLAGS} if isinstance(value, dict) else {}
    if not isinstance(content, str) or not all(isinstance(v, bool) for v in flags.values()):
        raise UserError(
            one_line(f"{path}: {key} must be a text, or an object with content: {value!r}")
        )
    return AddedToken(content, **flags)


# -- what the files change in the tokenizer -------------------------------------------------------


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, added: list[AddedToken], special: Mapping[str, _Special]
) -> None:
    """Add what tokenizer.json lacks; a token that it has gets the flags that an object states."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in added}
    tokens = list(added)
    named: dict[str, str | AddedToken] = {}
    for value in special.values():
        for token in value if isinstance(value, list) else [value]:
            named.setdefault(_content(token), token)
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


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, is_wanted: Any) -> None:
    """Let a pre-tokenizer on bytes put a space before a text, or not."""
    before = tokenizer.pre_tokenizer
    if isinstance(before, pre_tokenizers.ByteLevel) and isinstance(is_wanted, bool):
        before.add_prefix_space = is_wanted
        tokenizer.pre_tokenizer = before


def _set_post_processor(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    adds_bos: bool,
    special: Mapping[str, Any],
) -> None:
    """Put BOS and EOS around a text as tokenizer_config.json says, whatever tokenizer.json does."""
    around = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        token = special.get(f"{name}_token")
        default = default and (token is not None or f"{name}_token" in config)
        is_added = bool(config.get(f"add_{name}_token", default))
        if is_added and token is None:
            raise UserError(
                one_line(f"{folder / CONFIG_NAME}: add_{name}_token without a {name}_token")
            )
        around.append([(token, tokenizer.token_to_id(token))] if is_added else [])
    bos, eos = around
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(t for t, _ in bos), "$A", *(t for t, _ in eos)], special_tokens=[*bos, *eos]
    )
