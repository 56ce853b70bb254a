"""Answer formats of a server's configuration, beside those that `estimators.answers` has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from estimators.answers import ANSWER_FORMATS, opens_reasoning

if TYPE_CHECKING:  # the command line reads these settings, and shall not load a template's engine
    from serve.text.tokenizer import Tokenizer

_PROMPT_END_TOKENS = 16
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def compile_formats(patterns: Mapping[str, str]) -> Mapping[str, re.Pattern[str]]:
    """Return the formats by name; group 1 of a pattern's last match in a text is the answer.

    Raises:
        ValueError: a name is a built-in one or none at all, or a pattern is no regular expression
            or has no group.

    >>> sorted(compile_formats({"equals": "= ([0-9]+)"}))
    ['equals']
    >>> compile_formats({"boxed": "x"})
    Traceback (most recent call last):
        ...
    ValueError: answer format 'boxed' is built in; choose another name
    """
    return MappingProxyType({name: _compile(name, text) for name, text in patterns.items()})


def starts_in_reasoning(prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether the prompt opened the reasoning, of which a completion has but the end."""
    end = prompt_token_ids[-_PROMPT_END_TOKENS:]
    return opens_reasoning(tokenizer.decode_with_reasoning(end))


def _compile(name: str, text: str) -> re.Pattern[str]:
    if name in ANSWER_FORMATS:
        raise ValueError(f"answer format {name!r} is built in; choose another name")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"answer format {name!r}: a name has lower-case letters, digits and underscores, "
            "begins with a letter and has at most 64 characters"
        )
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:  # the latter of x{9999999999}, (((
        raise ValueError(f"answer format {name!r} is no regular expression: {error}") from error
    if not pattern.groups:
        raise ValueError(f"answer format {name!r} has no group; put the answer in parentheses")
    return pattern
