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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from bundle.errors import ModelFolderError, one_line
from bundle.json_files import check_plain_file, read_object
from serve.text.special_tokens import (
    ADDITIONAL,
    CLASS_OF_MODEL,
    CLASSES,
    EXTRA,
    GENERAL_CLASS,
    NAMES,
    TokenizerClass,
    add_tokens,
    as_list,
    contents_of,
    read_added_tokens,
    read_special_tokens,
    set_post_processor,
    set_prefix_space,
)

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"


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
        ModelFolderError: it is missing or none.
    """
    tokenizer = _parse(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read the files of a folder.

    Raises:
        ModelFolderError: a file is missing, is no JSON or has a value of another form than is
            known.
    """
    path, config = folder / CONFIG_NAME, _read_config(folder)
    tokenizer = _parse(folder / TOKENIZER_NAME)
    name = tokenizer_class(folder, config).removesuffix("Fast")
    defaults = CLASSES.get(name, TokenizerClass({}))
    older = _read_if_there(folder / "added_tokens.json")
    added = read_added_tokens(path, config, older, tokenizer)
    special = read_special_tokens(path, config, defaults, tokenizer, added)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    add_tokens(tokenizer, added, special)
    contents = contents_of(special)
    set_prefix_space(tokenizer, config, defaults)
    set_post_processor(path, tokenizer, config, defaults, contents)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return TokenizerFiles(tokenizer, contents, read_templates(folder, config))


def read_templates(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return a folder's chat templates by name; `config` is its tokenizer_config.json, if read."""
    if config is None:
        config = _read_if_there(folder / CONFIG_NAME)
    templates = {
        path.stem: _read_text(path) for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    }
    if (folder / TEMPLATE_NAME).exists():
        templates[DEFAULT_TEMPLATE] = _read_text(folder / TEMPLATE_NAME)
    if templates:
        return templates
    given = config.get("chat_template")
    if given is None:
        given = _read_if_there(folder / "chat_template.json").get("chat_template")
    return _templates_by_name(folder / CONFIG_NAME, given)


def tells_date(folder: Path) -> bool:
    """Say whether a chat template of the folder writes the date into prompts."""
    return any("strftime_now" in template for template in read_templates(folder).values())


def _templates_by_name(path: Path, given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT_TEMPLATE: given}
    entries = given.items() if isinstance(given, dict) else given
    if isinstance(given, list):
        entries = [(e.get("name"), e.get("template")) for e in given if isinstance(e, dict)]
    if not isinstance(given, dict | list) or not all(
        isinstance(text, str) for entry in entries for text in entry
    ):
        raise ModelFolderError(
            one_line(f"{path}: chat_template must be a text, or a list with name and template")
        )
    return dict(entries)


def tokenizer_class(folder: Path, config: Mapping[str, Any] | None = None) -> str:
    """Return transformers' class of a folder's tokenizer; `config` as in `read_templates`."""
    if config is None:
        config = _read_if_there(folder / CONFIG_NAME)
    name = config.get("tokenizer_class")
    if name is None:
        model = _read_if_there(folder / "config.json")
        name = model.get("tokenizer_class") or CLASS_OF_MODEL.get(str(model.get("model_type")))
    return GENERAL_CLASS if name is None else str(name)


# -- reading --------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    check_plain_file(path)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(one_line(f"{path} cannot be read: {error}")) from None


def _parse(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # The library has no errors of its own kind, and panics at some files: that is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelFolderError(one_line(f"{path} is damaged: {error}")) from None
        raise


def _read_if_there(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is no such file."""
    return read_object(path) if path.exists() else {}


def _read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with version 5's names replaced by version 4's."""
    config = _read_if_there(folder / CONFIG_NAME)
    if "added_tokens_decoder" not in config:
        older = _read_if_there(folder / "special_tokens_map.json")
        config |= {key: older[key] for key in NAMES if key in older}
        listed = as_list(config.get(ADDITIONAL))
        config[ADDITIONAL] = listed + [t for t in as_list(older.get(ADDITIONAL)) if t not in listed]
    extra = config.get("extra_special_tokens") or {}
    if isinstance(extra, list):
        config[ADDITIONAL] = as_list(config.get(ADDITIONAL)) + extra
        extra = {}
    named = config.get("model_specific_special_tokens") or {}
    if not isinstance(extra, dict) or not isinstance(named, dict):
        raise ModelFolderError(
            one_line(f"{folder / CONFIG_NAME}: extra special tokens must be a list or an object")
        )
    return {**config, EXTRA: {**extra, **named}}
