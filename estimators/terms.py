"""The terms of an expression: numbers, letters, operators; how they become text again."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_DECIMAL_PLACES = 20


class Term(NamedTuple):
    """A part of an expression: its text, the number that it is, whether it is a factor, a quotient.

    A quotient beside other factors needs brackets.
    """

    text: str
    value: Fraction | None = None
    is_factor: bool = True
    is_quotient: bool = False


PLUS, MINUS, SLASH = (Term(sign, is_factor=False) for sign in "+-/")
TIMES = Term("*", is_factor=False)
CROSS = Term("\\times", is_factor=False)
OPERATORS = {"+": PLUS, "-": MINUS, "/": SLASH, "*": TIMES, "\\times": CROSS}


def spell_number(number: Fraction) -> str:
    """Return a decimal where that ends within 20 places, else p/q."""
    one = 10**_DECIMAL_PLACES
    if one % number.denominator:
        return str(number)
    whole, places = divmod(abs(number.numerator) * (one // number.denominator), one)
    sign = "-" if number < 0 else ""
    return f"{sign}{whole}.{places:0{_DECIMAL_PLACES}}".rstrip("0").rstrip(".")


def evaluate(terms: Sequence[Term]) -> Fraction | None:
    """Return the number that the terms are: one with signs, or a quotient of two."""
    sign = 1
    while terms and terms[0] in (PLUS, MINUS):
        sign *= -1 if terms[0] == MINUS else 1
        terms = terms[1:]
    values = [term.value for term in terms if term.value is not None]
    if len(terms) == 1 and values:
        return sign * values[0]
    if len(terms) == 3 and terms[1] == SLASH and len(values) == 2 and values[1]:
        return sign * values[0] / values[1]
    return None


def arrange(terms: list[Term]) -> list[Term]:
    """Join 3*10^8, drop a leading plus, and put the minus of a first number before it."""
    joined: list[Term] = []
    for term in terms:
        is_scaled = len(joined) > 1 and joined[-1] in (TIMES, CROSS) and SLASH not in joined[-3:]
        factor = joined[-2].value if is_scaled else None
        if factor is not None and term.value is not None and _is_power_of_ten(term.value):
            del joined[-2:]
            term = Term(spell_number(factor * term.value), factor * term.value)
        joined.append(term)
    while len(joined) > 1 and joined[0] == PLUS:
        del joined[0]
    if joined and joined[0].value is not None and joined[0].value < 0:
        joined[:1] = [MINUS, Term(spell_number(-joined[0].value), -joined[0].value)]
    return joined


def _is_power_of_ten(number: Fraction) -> bool:
    digits = str(max(number.numerator, number.denominator))
    return 1 in (number.numerator, number.denominator) and digits.strip("0") == "1"


def join(terms: Sequence[Term]) -> str:
    """Return the text of terms: a product has its sign only where two numbers would touch."""
    text = ""
    for index, term in enumerate(terms):
        before = terms[index - 1] if index else None
        after = terms[index + 1] if index + 1 < len(terms) else None
        part = term.text
        if term in (TIMES, CROSS):
            part = _product_sign(term, before, after)
        elif _needs_brackets(term, before, after):
            part = f"({part})"
        text += _gap(text, part) + part
    return text


def _needs_brackets(term: Term, before: Term | None, after: Term | None) -> bool:
    if term.is_factor and term.text.startswith("-"):
        return before is not None
    is_quotient = term.is_quotient or (term.value is not None and "/" in term.text)
    neighbours = [n for n in (before, after) if n is not None]
    return is_quotient and any(n.is_factor or n in (TIMES, CROSS, SLASH) for n in neighbours)


def _product_sign(sign: Term, before: Term | None, after: Term | None) -> str:
    if before is None or after is None or not (before.is_factor and after.is_factor):
        return sign.text
    if sign == CROSS and not (before.text[:1].isdigit() or after.text[:1].isdigit()):
        return sign.text
    return "*" if after.text[:1].isdigit() or after.text[:1] == "." else ""


def _gap(text: str, part: str) -> str:
    """Return the space without which two parts would be read as one."""
    if part[:1].isalpha() and "\\" in text and text[text.rindex("\\") + 1 :].isalpha():
        return " "
    return " " if text[-1:].isdigit() and part[:1].isdigit() else ""
