"""One spelling of mathematical expressions: numbers, fractions, roots, powers, brackets, matrices.

The terms stay in their order and nothing is computed but numbers: whether x(x+1) is x^2+x is left
to a computer algebra system.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from estimators.latex import (
    CLOSING,
    FUNCTIONS,
    NUMBER,
    OPENING,
    RELATIONS,
    SYMBOLS,
    UnreadableError,
    tokenize,
)
from estimators.terms import MINUS, OPERATORS, PLUS, Term, arrange, evaluate, join, spell_number

_MAX_DEPTH = 20
_MAX_NUMBER_CHARS = 100


def read_expression(text: str) -> str:
    """Return the one spelling of an expression; applied to it, this changes nothing more.

    Raises:
        UnreadableError: it cannot be read as one.

    >>> read_expression("\\\\left(3, \\\\dfrac x2\\\\right)"), read_expression("2 \\\\cdot x^{2}")
    ('(3,x/2)', '2x^2')
    >>> read_expression("-12 \\\\frac{3}{5}"), read_expression("12\\\\frac35x")
    ('-12.6', '12.6x')
    """
    return _spell(tokenize(text), 0)


_NUMBER = re.compile(NUMBER)
_WIDE_EXPONENT = re.compile(r"[eE][-+]?[0-9]{3}")


def _spell(tokens: Sequence[str], depth: int) -> str:
    """Return the spelling of tokens without commas outside brackets, or of a list of such."""
    parts = _split(tokens, ",")
    if len(parts) > 1:
        return ",".join(_spell(part, depth) for part in parts)
    terms = _Reader(tokens, depth).read()
    number = evaluate(terms)
    return join(terms) if number is None else spell_number(number)


def _split(tokens: Sequence[str], *separators: str) -> list[list[str]]:
    """Split at tokens outside brackets and environments."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += token in OPENING or token == "\\begin"
        depth -= token in CLOSING or token == "\\end"
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _number(token: str) -> Fraction | None:
    if len(token) > _MAX_NUMBER_CHARS or _WIDE_EXPONENT.search(token):
        return None
    return Fraction(token) if _NUMBER.fullmatch(token) else None


def _power_of_ten(base: Term, exponent: str) -> Fraction | None:
    if base.value == 10 and re.fullmatch(r"-?[0-9]{1,2}", exponent):
        return Fraction(10) ** int(exponent)
    return None


class _Reader:
    """Reads the tokens of one expression into terms."""

    def __init__(self, tokens: Sequence[str], depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise UnreadableError("brackets nest too deep")
        self._tokens = list(tokens)
        self._next = 0
        self._depth = depth
        self._terms: list[Term] = []

    def read(self) -> list[Term]:
        """Return the terms. UnreadableError as `read_expression`."""
        while self._next < len(self._tokens):
            self._read_term(self._take())
        return arrange(self._terms)

    def _take(self) -> str:
        if self._next >= len(self._tokens):
            raise UnreadableError("an argument is missing")
        self._next += 1
        return self._tokens[self._next - 1]

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _read_term(self, token: str) -> None:
        if token in OPERATORS:
            self._terms.append(OPERATORS[token])
        elif _NUMBER.fullmatch(token):
            self._terms.append(self._read_number(token))
        elif token == "\\frac":
            self._terms.append(self._read_fraction())
        elif token == "\\sqrt":
            self._terms.append(self._read_root())
        elif token in ("\\binom", "\\dbinom", "\\tbinom"):
            above, below = (_spell(self._take_argument(), self._depth + 1) for _ in "ab")
            self._terms.append(Term(f"\\binom{{{above}}}{{{below}}}"))
        elif token in ("^", "_", "'"):
            self._read_script(token)
        elif token in OPENING:
            self._read_group(token)
        elif token in CLOSING:
            raise UnreadableError(f"{token} closes nothing")
        elif token == "\\begin":
            self._terms.append(self._read_environment())
        elif token.startswith("\\") and token[1:].isalpha():
            self._read_command(token)
        elif token in FUNCTIONS:
            self._read_command("\\" + token)
        else:
            self._terms.append(Term(token, is_factor=token.isalpha()))

    # --- numbers and fractions

    def _read_number(self, token: str) -> Term:
        number = _number(token)
        is_time = token.startswith("0") and bool(self._terms) and self._terms[-1].text == ":"
        if number is None or is_time:
            return Term(token)
        if token.isdigit() and not self._is_behind_digits():
            number += self._read_proper_fraction() or 0
        return Term(spell_number(number), number)

    def _is_behind_digits(self) -> bool:
        return bool(self._terms) and self._terms[-1].text[-1:].isdigit()

    def _read_proper_fraction(self) -> Fraction | None:
        """Return the fraction of a mixed number, in LaTeX or as p/q; None leaves it unread."""
        start = list(self._tokens), self._next
        if self._peek() == "\\frac":
            self._take()
            above, below = ("".join(self._take_argument()) for _ in "ab")
        else:
            above, slash, below = [*self._tokens[self._next : self._next + 3], "", "", ""][:3]
            below = below if slash == "/" else ""
            self._next += 3
        if above.isdigit() and below.isdigit() and self._peek() not in ("^", "/"):
            numerator, denominator = _number(above), _number(below)
            if numerator and denominator and numerator < denominator:
                return numerator / denominator
        self._tokens, self._next = start
        return None

    def _read_fraction(self) -> Term:
        above, below = (self._inner(self._take_argument()) for _ in "ab")
        numerator, denominator = evaluate(above), evaluate(below)
        if numerator is not None and denominator:
            return Term(spell_number(numerator / denominator), numerator / denominator)
        is_sum = any(term in (PLUS, MINUS) for term in above[1:])
        top = f"({join(above)})" if is_sum else join(above)
        bottom = join(below)
        if len(below) != 1 or "/" in bottom or (bottom.isalpha() and len(bottom) > 1):
            bottom = f"({bottom})"
        return Term(f"{top}/{bottom}", is_quotient=True)

    def _read_root(self) -> Term:
        index = ""
        if self._peek() == "[":
            self._take()
            index = f"[{_spell(self._take_until('['), self._depth + 1)}]"
        radicand = _spell(self._take_argument(takes_number=True), self._depth + 1)
        return Term(f"\\sqrt{index}{{{radicand}}}")

    # --- powers, indices, primes

    def _read_script(self, token: str) -> None:
        base = self._terms.pop() if self._terms and self._terms[-1].is_factor else Term("")
        if token == "'":
            self._terms.append(Term(f"{base.text}'"))
            return
        argument = self._take_argument(takes_number=True)
        if argument == ["'"]:
            self._terms.append(Term(f"{base.text}'"))
            return
        script = _spell(argument, self._depth + 1)
        power = _power_of_ten(base, script) if token == "^" else None
        if power is not None:
            self._terms.append(Term(spell_number(power), power))
            return
        text = f"({base.text})" if "/" in base.text or base.text.startswith("-") else base.text
        script = script if len(script) == 1 or script == "\\circ" else f"{{{script}}}"
        self._terms.append(Term(f"{text}{token}{script}"))

    def _take_argument(self, *, takes_number: bool = False) -> list[str]:
        """Return the tokens of a command's argument: in braces, or a single digit or letter."""
        token = self._take()
        if token == "{" or (token == "(" and takes_number):
            return self._take_until(token)
        if token == "\\sqrt":
            return [token, "{", *self._take_argument(takes_number=True), "}"]
        if token == "-" and takes_number:
            return [token, *self._take_argument(takes_number=True)]
        is_number = _NUMBER.fullmatch(token) is not None
        if (is_number and not takes_number) or (token.isalpha() and token not in FUNCTIONS):
            if len(token) > 1:  # \frac12, x^ab
                self._next -= 1
                self._tokens[self._next] = token[1:]
            return [token[0]]
        if token in CLOSING or token in ("^", "_", "\\frac", "&", "\\\\"):
            raise UnreadableError(f"{token} is no argument")
        return [token]

    # --- brackets

    def _take_until(self, opening: str) -> list[str]:
        """Return the tokens up to the bracket that closes, and skip that."""
        start, open_brackets = self._next, [opening]
        while open_brackets:
            token = self._take()
            if token in OPENING:
                open_brackets.append(token)
            elif token in CLOSING and token not in OPENING[open_brackets.pop()]:
                raise UnreadableError(f"{token} closes another bracket")
        return self._tokens[start : self._next - 1]

    def _read_group(self, opening: str) -> None:
        inside = self._take_until(opening)
        closing = self._tokens[self._next - 1]
        if opening == "{":
            self._terms += self._inner(inside)
            return
        if opening + closing == "()" and "," not in inside:
            self._terms.append(self._read_brackets(inside))
            return
        if opening + closing == "[]" and inside[:4] == ["\\begin", "{", "array", "}"]:
            self._terms.append(self._read_brackets(inside))
            return
        elements = [_spell(part, self._depth + 1) for part in _split(inside, ",", ";")]
        if opening == "\\{" and "|" not in inside and ":" not in inside:
            elements = sorted({element for element in elements if element})
        text = f"{opening}{','.join(elements)}{closing}"
        self._terms.append(Term("\\emptyset" if text == "\\{\\}" else text))

    def _read_brackets(self, inside: Sequence[str]) -> Term:
        terms = self._inner(inside)
        if len(terms) == 1 and terms[0].text.startswith("\\begin{"):
            return Term(terms[0].text.replace("{array}", "{pmatrix}"))
        is_alone = self._next == len(self._tokens) and not any(i.is_factor for i in self._terms)
        is_argument = bool(self._terms) and self._terms[-1].text[1:] in FUNCTIONS
        number = evaluate(terms)
        if number is not None and (is_alone or is_argument) and number >= 0:
            return Term(spell_number(number), number)
        if len(terms) == 1 and terms[0].is_factor and (is_alone or is_argument):
            return terms[0]
        if is_alone and not self._terms:
            return Term(join(terms), is_factor=False)
        text = join(terms) if number is None else spell_number(number)
        return Term(f"({text})")

    def _inner(self, tokens: Sequence[str]) -> list[Term]:
        return _Reader(tokens, self._depth + 1).read()

    # --- commands

    def _read_command(self, token: str) -> None:
        has_none = token in SYMBOLS or token in RELATIONS or token[1:] in FUNCTIONS
        if not has_none and self._peek() == "{":
            self._take()
            argument = _spell(self._take_until("{"), self._depth + 1)
            self._terms.append(Term(f"{token}{{{argument}}}"))
            return
        self._terms.append(Term(token, is_factor=token not in RELATIONS))

    def _read_environment(self) -> Term:
        """Read a matrix, whose cells are expressions; bmatrix is another font of pmatrix."""
        name = self._take_name()
        if name == "array" and self._peek() == "{":
            self._take_name()
        start, depth = self._next, 1
        while depth:
            token = self._take()
            depth += (token == "\\begin") - (token == "\\end")
        inside = self._tokens[start : self._next - 1]
        self._take_name()
        rows = "\\\\".join(
            "&".join(_spell(cell, self._depth + 1) for cell in _split(row, "&"))
            for row in _split(inside, "\\\\")
            if row
        )
        name = {"bmatrix": "pmatrix", "smallmatrix": "pmatrix"}.get(name, name)
        return Term(f"\\begin{{{name}}}{rows}\\end{{{name}}}")

    def _take_name(self) -> str:
        if self._take() != "{":
            raise UnreadableError("an environment lacks its name")
        return "".join(self._take_until("{"))
