"""The name of what has a value: x in x = 5, f(x) in f(x) = 2x, x in x \\in [0, 1]."""

from __future__ import annotations

import re

from estimators.latex import FUNCTIONS
from estimators.units import split_unit

_COMMAND = re.compile(r"\\[A-Za-z]+")
_NAME = re.compile(
    r"""
    ( \\?[A-Za-z]+ '{0,3} (?: _ \{?[A-Za-z0-9]{1,8}\}? )? (?: \( [A-Za-z0-9, ]{1,20} \) )?
    | (?: \\(?:angle|triangle) | m \s? \\angle ) \s? [A-Z]{1,3}
    | \( \s? [A-Za-z] (?: \s?,\s? [A-Za-z] ){1,7} \s? \)
    | \\text\{ [A-Za-z ]{1,40} \} | [A-Za-z][A-Za-z ]{0,39}
    )
    \s? ( = | \\in(?![A-Za-z]) ) \s?
    """,
    re.VERBOSE,
)
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|leq|geq|neq|approx|equiv|lt|gt|in)(?![A-Za-z])")
_REVERSED = re.compile(r"([^=<>A-Za-z]*[0-9][^=<>A-Za-z]*)=\s?([A-Za-z])\s?")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm)\s?\{[^{}]*\}")
_SET = re.compile(r"[(\[]|\\\{|\\mathbb|\\emptyset")


def split_name(text: str) -> tuple[str, str]:
    """Return the name and the value of x = 5; an equation between unknowns has no name."""
    if reverse := _REVERSED.fullmatch(text):
        text = f"{reverse[2]}={reverse[1]}"
    match = _NAME.match(text)
    if match is None or _RELATION.search(text, match.end()):
        return "", text
    value = text[match.end() :]
    is_function = "(" in match[1]
    if match[2] != "=" and not _SET.match(value.replace("\\left", "").lstrip()):
        return "", text
    if not value or not (is_function or _is_closed(value)):
        return "", text
    name = (
        match[1].strip().removeprefix("\\text{").removesuffix("}") if " " in match[1] else match[1]
    )
    name = re.sub(r"\\text|[{}]", "", name).strip()
    if re.fullmatch(r"[A-Za-z ]{4,}", name):
        return f"\\text{{{name.casefold()}}}", value
    return name.replace(" ", ""), value


def _is_closed(value: str) -> bool:
    """Say whether it has no letters that stand for unknowns: i and e are numbers."""
    text = _COMMAND.sub(" ", _TEXT.sub(" ", split_unit(value)[0]))
    return not any(
        word not in FUNCTIONS | {"e", "i", "pi", "R", "or", "and", "infinity"}
        for word in re.findall(r"[A-Za-z]+", text)
    )
