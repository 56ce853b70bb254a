"""The canonical form of an answer, and which answers are the same.

An answer in canonical form is a value, perhaps with the name of what has it in front (`x=5`) and
its unit behind (`5\\text{cm}`). Who leaves the name or the unit out means the same; who names
another one does not. So `5` is the same as `5\\text{cm}` and as `5\\text{m}`, which are two
different answers: `is_same` is symmetric, and `group` makes classes of a set of answers.

The text is untrusted: what is longer than 1,000 characters or nests deeper than 20 brackets is
compared as it is written, and the work on the rest is bounded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from estimators.expressions import read_expression
from estimators.latex import UnreadableError, join_thousands, split_list, translate
from estimators.markup import has_words, plain, without_fonts, without_markup, words
from estimators.names import split_name
from estimators.units import spell_unit, split_unit

_MAX_CHARS = 1000
_MAX_ROUNDS = 8


def canonicalise(answer: str | None) -> str | None:
    """Return the one spelling under which equal answers are counted, or None for an empty one.

    * Numbers are exact: spelled as a decimal where that ends within 20 places, else as p/q.
      `12 \\frac{3}{5}`, `12\\frac35` and `12 3/5` are 12.6; `1,000`, `1{,}000` and `1\\,000`
      are 1000, `1,2` and `(1,234)` are lists. What is too long to compute with stays text.
    * Expressions lose layout, fonts, spaces and what LaTeX has two spellings for; their terms stay
      in order and letters keep their case. `y=2x+3` stays an equation.
    * Units have one spelling: `5 centimeters` is `5\\text{cm}`; "50%" is not 0.5, as in MATH
      (Hendrycks et al., 2021).
    * Several values without brackets, and those of a set, are in no order; of an interval, a tuple
      or a matrix they are. Letters without brackets stay in order, as in a ranking.
    * Words are lower-cased, a single letter is upper-cased and loses its brackets.

    Applying it twice changes nothing more.

    >>> [canonicalise(answer) for answer in ("1,000.0", "$\\\\frac{1}{2}$", "2/6", "(b)", "x = 5.")]
    ['1000', '0.5', '1/3', 'B', 'x=5']
    >>> canonicalise("**Paris**."), canonicalise(" ")
    ('paris', None)
    """
    if answer is None:
        return None
    text = " ".join(answer.split())
    for _ in range(_MAX_ROUNDS):  # each may uncover what another one reads
        before, text = text, _once(text)
        if text == before:
            return text or None
    return plain(answer) or None


def is_same(one: str, other: str) -> bool:
    """Return whether two canonical forms are the same answer: neither contradicts the other.

    >>> is_same("5", "5\\\\text{cm}"), is_same("5\\\\text{m}", "5\\\\text{cm}")
    (True, False)
    >>> is_same("x=5", "5"), is_same("x=5", "y=5")
    (True, False)
    """
    if one == other:
        return True
    a, b = _parts(one), _parts(other)
    return a.value == b.value and not _differ(a.name, b.name) and not _differ(a.unit, b.unit)


def group(answers: Iterable[str]) -> dict[str, str]:
    """Map each canonical form to the one that stands for its class, whatever their order.

    Names and units count only where the answers of one value have two different ones.

    >>> group(["5", "x=5", "6"])
    {'5': 'x=5', 'x=5': 'x=5', '6': '6'}
    """
    parts = {answer: _parts(answer) for answer in answers}
    names: dict[str, set[str]] = defaultdict(set)
    units: dict[str, set[str]] = defaultdict(set)
    for part in parts.values():
        names[part.value].add(part.name)
        units[part.value].add(part.unit)
    members: dict[_Parts, list[str]] = defaultdict(list)
    for answer, part in parts.items():
        name = part.name if len(names[part.value] - {""}) > 1 else ""
        unit = part.unit if len(units[part.value] - {""}) > 1 else ""
        members[_Parts(name, part.value, unit)].append(answer)
    fullest = {
        answer: max(of, key=lambda text: (len(text), text))
        for of in members.values()
        for answer in of
    }
    return {answer: fullest[answer] for answer in parts}


def comparable_values(one: str, other: str) -> tuple[str, str] | None:
    """Return the values of two canonical forms that a computer algebra system may find equal.

    None where the forms are the same or contradict each other, and where math-verify says yes to
    what differs: it reads words as products of letters, rounds numbers, takes y=2x+3 for 2x+3, a
    tuple for a set, a derivative for its function and 1010_2 for 1010.

    >>> comparable_values("(x+1)^2", "x^2+2x+1"), comparable_values("0.333", "1/3")
    (('(x+1)^2', 'x^2+2x+1'), None)
    """
    a, b = _parts(one), _parts(other)
    is_conflict = _differ(a.name, b.name) or _differ(a.unit, b.unit)
    are_numbers = _NUMBER.fullmatch(a.value) and _NUMBER.fullmatch(b.value)
    if a.value == b.value or is_conflict or are_numbers or not _have_one_shape(a.value, b.value):
        return None
    return (a.value, b.value) if _is_mathematics(a.value) and _is_mathematics(b.value) else None


# --- the parts of a canonical form


class _Parts(NamedTuple):
    """Name and unit are "" where there is none."""

    name: str
    value: str
    unit: str


_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:/[0-9]+)?")
_SIGN = re.compile(r"[^A-Za-z\s.,;:!?'\"]")
_EQUATION, _PRIME, _BASE = re.compile("[=:]"), re.compile("'"), re.compile("[0-9]_")
_MAX_COMPARED_CHARS = 500
_UNIT = re.compile(r"(?:\\text\{[^{}]*\}|\\%|\^\\circ)\Z")


def _parts(canonical: str) -> _Parts:
    name, value = split_name(canonical)
    unit = _UNIT.search(value)
    if unit is None or unit.start() == 0:
        return _Parts(name, value, "")
    return _Parts(name, value[: unit.start()], unit[0])


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def _have_one_shape(one: str, other: str) -> bool:
    """Say whether both are lists, equations, ratios, derivatives or numbers of a base, or neither.

    An inequality may be an interval.
    """
    is_interval = "," in one + other and bool(_INEQUALITY.search(one) or _INEQUALITY.search(other))
    if is_interval and "=" not in one + other:
        return True
    return all(
        len(sign.findall(one)) == len(sign.findall(other)) for sign in (_EQUATION, _PRIME, _BASE)
    ) and _brackets(one) == _brackets(other)


def _brackets(value: str) -> str:
    """Return the outer brackets of a list, "" for one value."""
    if value.startswith(("\\{", "\\begin")):
        return value[:3]
    return value[0] if value[0] in "([" and value[-1] in ")]" and "," in value else ""


def _is_mathematics(text: str) -> bool:
    """Say whether it has a sign other than letters (or is a letter in upper case), and no words."""
    if len(text) > _MAX_COMPARED_CHARS or not (_SIGN.search(text) or re.fullmatch("[A-Z]", text)):
        return False
    return not has_words(text)


# --- one round

_SINGLE_LETTER = re.compile(r"[(\[{]?\s?([A-Za-z])\s?[)\]}]?")
_TIME = re.compile(r"([0-9]{1,2}(?::[0-9]{2})?)\s*([APap])\.?\s?[Mm]\s?")
_CONJUNCTION = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s?\{\s?(and|or|,)\s?\}")
_WHOLE_SET = re.compile(r"\\\{(?:[^\\|:]|\\(?![{}]|mid|vert|colon))+\\\}")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq)(?![A-Za-z])")
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)  # fmt: skip


def _once(text: str) -> str:
    if len(text) > _MAX_CHARS:
        return plain(text)
    text = without_markup(translate(text))
    if letter := _SINGLE_LETTER.fullmatch(text):
        return letter[1].upper()
    if clock := _TIME.fullmatch(without_fonts(text)):
        return f"{clock[1]} {clock[2].lower()}m"
    if text.casefold() in _NUMBER_WORDS:
        return str(_NUMBER_WORDS.index(text.casefold()))
    try:
        return _read_values(join_thousands(text)) or words(text)
    except UnreadableError:
        return words(text)


def _read_values(text: str) -> str:
    """Return the spelling of one value or of several; "" where the text is words.

    Raises:
        UnreadableError: it is neither.
    """
    text = _CONJUNCTION.sub(r" \1 ", text)
    name, inside = split_name(text)
    inside, unit = split_unit(inside)
    is_set = _WHOLE_SET.fullmatch(inside) is not None
    if is_set:
        inside, unit = inside[2:-2], spell_unit(unit)
    else:
        name, inside, unit = "", text, ""
    texts = [text] if _INEQUALITY.search(text) else split_list(inside)
    parts = [_read_part(choice) for part in texts for choice in _both_signs(part)]
    read = [part for part in parts if part is not None]
    if len(read) < len(parts) or not read:
        return ""
    return _spell_values(read, is_set, name, unit)


def _both_signs(text: str) -> list[str]:
    if text.count("\\pm") != 1 or "\\mp" in text:
        return [text]
    return [text.replace("\\pm", "+"), text.replace("\\pm", "-")]


def _read_part(text: str) -> _Parts | None:
    """Return name, value and unit of one value, None for words."""
    name, value = split_name(text)
    value, unit = split_unit(value)
    value = without_fonts(value)
    if has_words(value):
        return None
    spelled = read_expression(value)
    return _Parts(name, spelled, spell_unit(unit)) if spelled else None


def _spell_values(parts: list[_Parts], is_set: bool, name: str, unit: str) -> str:
    """Put a name or unit that all have, or that one has for all, outside."""
    names = {part.name for part in parts} | {name}
    units = {part.unit for part in parts} | {unit}
    has_one_name, has_one_unit = len(names - {""}) == 1, len(units - {""}) == 1
    name, unit = max(names) if has_one_name else "", max(units) if has_one_unit else ""
    texts = [
        f"{_before('' if has_one_name else part.name)}{part.value}"
        f"{'' if has_one_unit else part.unit}"
        for part in parts
    ]
    if len(texts) == 1 and not is_set:
        values = texts[0]
    elif is_set or len(set(texts)) == len(texts) > sum(map(str.isalpha, texts)):
        values = f"\\{{{','.join(sorted(set(texts)))}\\}}"
    elif all(map(str.isalpha, texts)):
        values = ", ".join(text.upper() for text in texts)
    else:
        values = ", ".join(sorted(texts))
    return f"{_before(name)}{values}{unit}"


def _before(name: str) -> str:
    return f"{name}=" if name else ""
