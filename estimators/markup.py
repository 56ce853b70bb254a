"""What stands around an answer and says nothing: markdown, fonts, boxes, "The answer is"."""

from __future__ import annotations

import re

from estimators.latex import FUNCTIONS

_COMMAND = re.compile(r"\\[A-Za-z]+")
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|mbox|mathrm|mathbf|mathit|mathsf|rm|bf"
    r"|operatorname|boxed|fbox|displaystyle|bold|boldsymbol)\s?\{([^{}]*)\}"
)
_WRAPPER = re.compile(r"\\(?:boxed|fbox)\s?\{(.*)\}", re.DOTALL)
_LEFT_RIGHT = re.compile(r"\\(?:left|right)(?![A-Za-z])\s?\.?|(?<!\\)\\[()\[\]]")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|and),?\s)?(?:the\s)?(?:final\s|correct\s)?answer"
    r"(?:\s(?:is|to\sthe\s\w+\sis)(?![a-z])\s?:?|\s?[:=])\s?",
    re.IGNORECASE,
)
_VOWEL = re.compile(r"[AEIOUaeiou]")
_INDEX = re.compile(r"_\s?\{[^{}]*\}")
_CONSTANTS = frozenset({"infinity", "inf", "pi"})
_LETTERS = re.compile(r"[A-Za-z]+")
_ONLY_LETTERS = re.compile(r"[A-Za-z\s]*[A-Za-z]{2}[A-Za-z\s]*")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s?\{[a-z*]*\}(?:\{[clr|]*\})?")
_TIGHT_COMMA = re.compile(r",(?=\S)")


def plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def without_markup(text: str) -> str:
    """Strip until nothing changes: each step may uncover what another one removes."""
    before = None
    while text != before:
        before = text
        text = _LEFT_RIGHT.sub("", text)
        if text.count("$") % 2 == 0 and "\\$" not in text:
            text = text.replace("$", "")
        text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
        if (wrapped := _WRAPPER.fullmatch(text)) and _is_one_group(wrapped[1]):
            text = wrapped[1]
        if (font := _FONT.fullmatch(text)) is not None:
            text = font[1]
        text = _strip_behind(" ".join(text.split()).lstrip(' #*_`"'))
    return text


def _is_one_group(inside: str) -> bool:
    depth = 0
    for char in inside.replace("\\{", "").replace("\\}", ""):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _strip_behind(text: str) -> str:
    """Strip marks and spaces from the end; a mark behind a backslash is another sign."""
    while text and (text[-1] in ' *_`".,;:~' or text == "$"):
        if text[-2:-1] == "\\":
            if text[-1] not in ",;: ":
                break
            text = text[:-1]
        text = text[:-1]
    return text


def words(text: str) -> str:
    """Return words in lower case, without fonts."""
    return _TIGHT_COMMA.sub(", ", _strip_behind(plain(without_fonts(text))).lstrip(' #*_`"'))


def has_words(text: str) -> bool:
    """Say whether letters are words, not variables: three together, or nothing but letters."""
    if text.strip() in _CONSTANTS:
        return False
    text = _COMMAND.sub(" ", _INDEX.sub(" ", _ENVIRONMENT.sub(" ", text)))
    runs = [run for run in _LETTERS.findall(text) if run not in FUNCTIONS and run not in _CONSTANTS]
    if any(len(run) > 2 and _VOWEL.search(run) and run != "abc" for run in runs):
        return True
    return _ONLY_LETTERS.fullmatch(text) is not None and (
        any(len(run) > 1 for run in runs) or not runs
    )


def without_fonts(text: str) -> str:
    """Return the text with what font commands hold in their place."""
    before = None
    while text != before:
        before, text = text, _FONT.sub(r" \1 ", text)
    return text
