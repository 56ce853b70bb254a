"""Answers in free text: where they stand (`extract`), and which are the same (`canonicalise`).

The text is untrusted and may be long: every pattern here repeats only over characters that cannot
begin what follows them, so the work is linear in the text, and no number is computed that does not
fit in `_MAX_NUMBER_CHARS`.

One way to a vote: `majority_vote(canonicalise(extract(text, "boxed")) for text in texts)`.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

_MAX_NUMBER_CHARS = 100
_MAX_MARKUP_CHARS = 1000
_DECIMAL_PLACES = 20

# 1,234.5  .5  6e-3: thousands separators only where they separate thousands.
_DECIMAL = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


# Where an answer stands


def extract(text: str, answer_format: str) -> str | None:
    """Return the answer in `text` as it is written there, or None when there is none.

    The formats are the keys of `ANSWER_FORMATS`:

    * `none`: there is nothing to extract.
    * `last_number`: the last number, a fraction such as 3/4 included, without currency or percent.
    * `boxed`: what the last `\\boxed{...}` holds; None when that box is never closed.
    * `choice`: a letter A to E: the last one stated ("Answer: B", "the answer is (b)"), else the
      last one alone on a line, else the last one in brackets, else the one that starts a line
      ("B. Paris") if only one does. The article "A" is none of these.
    * `final_line`: the last line that is not blank.

    Raises:
        ValueError: for any other format.

    >>> extract("2 + 3 = 5, so 5 apples cost $1,234.50.", "last_number")
    '1,234.50'
    >>> extract("A cat sat", "choice") is None
    True
    >>> extract("42", "json")
    Traceback (most recent call last):
        ...
    ValueError: unknown answer_format 'json'; valid: none, last_number, boxed, choice, final_line
    """
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(
            f"unknown answer_format {answer_format!r}; valid: {', '.join(ANSWER_FORMATS)}"
        )
    return ANSWER_FORMATS[answer_format](text)


def _no_answer(text: str) -> None:
    return None


# A minus belongs to the number unless it subtracts; digits inside a word (x2, H2O) are no number.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])[-+−])?\$?(?<![A-Za-z0-9_]){_DECIMAL}(?: ?/ ?{_DECIMAL})?", re.ASCII
)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace("$", "") if numbers else None


_BOX_OPENING = re.compile(r"\\(?:boxed|fbox)[ \t]*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _last_boxed(text: str) -> str | None:
    openings = [opening.end() for opening in _BOX_OPENING.finditer(text)]
    if not openings:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, openings[-1]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[openings[-1] : brace.start()].strip() or None
    return None


_CHOICE_MARKUP = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)(?![A-Za-z])")
# The letter must end its clause: "Answer: A cat" states no choice, "A, because" and "A is" do.
_STATED_CHOICE = re.compile(
    r"""
    \b (?: answer \b [^\w.]{0,6} (?:is\b)? | (?:option|choice) [^\w.]{0,4} (?:is\b|:) )
    [^\w.]{0,6} (?: (?:option|choice) \W{1,3} )?
    ([A-E])
    (?= \Z | [ \t\r]{0,4} \n | [.,:;!*)\]}$"'] (?!\w)
      | [ \t] (?: [(–—-] | (?:is|as|because|since) \b ) )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_BRACKETED_CHOICE = re.compile(r"[(\[{] ?([A-Ea-e]) ?[)\]}]")
_LEADING_CHOICE = re.compile(r"^[ \t*(]{0,8}([A-E])[.):]\*{0,2}[ \t]", re.MULTILINE)


def _choice(text: str) -> str | None:
    text = _CHOICE_MARKUP.sub("", text).strip()
    lines = (line.strip(" \t*_$.:()[]{}\"'`") for line in text.splitlines())
    leading = _LEADING_CHOICE.findall(text)
    found = (
        _STATED_CHOICE.findall(text)
        or [line for line in lines if len(line) == 1 and line in "ABCDEabcde"]
        or _BRACKETED_CHOICE.findall(text)
        or (leading if len(leading) == 1 else [])
    )
    return found[-1].upper() if found else None


def _final_line(text: str) -> str | None:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


ANSWER_FORMATS: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "none": _no_answer,
        "last_number": _last_number,
        "boxed": _last_boxed,
        "choice": _choice,
        "final_line": _final_line,
    }
)


# Which answers are the same


def canonicalise(answer: str | None) -> str | None:
    """Return the one spelling under which equal answers are counted, or None for an empty one.

    * A number is compared as an exact fraction and spelled as a decimal where that ends within 20
      places, else as p/q. Thousands separators, a dollar and a percent sign are dropped, so "50%"
      is "50" and not "0.5" (Hendrycks et al., MATH, 2021, drop it too). A number of more than 100
      characters or with an exponent beyond ±99 stays text.
    * Text is lower-cased and its white space made single; a single letter is upper-cased and loses
      its brackets.
    * Both lose LaTeX and markdown around them and a full stop after them, unless they are longer
      than 1,000 characters. Units are kept: "5 km" is not "5".

    Applying it twice changes nothing more.

    >>> [canonicalise(answer) for answer in ("1,000", "1000.0", "$\\\\frac{1}{2}$", "2/6", "(b)")]
    ['1000', '1000', '0.5', '1/3', 'B']
    >>> canonicalise("**Paris**."), canonicalise(" ")
    ('paris', None)
    """
    if answer is None:
        return None
    text = " ".join(answer.split()).casefold()
    if len(text) > _MAX_MARKUP_CHARS:
        return text
    text = _without_markup(text)
    number = _parse_number(text)
    if number is not None:
        return _spell(number)
    if letter := _SINGLE_LETTER.fullmatch(text):
        return letter[1].upper()
    return _TIGHT_COMMA.sub(", ", text) or None


def is_correct(answer: str | None, reference: str) -> bool:
    """Return whether both are the same answer; an abstention (None, or empty) is not correct.

    Raises:
        ValueError: if the reference is empty, against which nothing can be correct.

    >>> is_correct("1,000.", "1000")
    True
    >>> is_correct("4", " ")
    Traceback (most recent call last):
        ...
    ValueError: reference ' ' is empty; give the right answer, or ask for no correctness
    """
    canonical_reference = canonicalise(reference)
    if canonical_reference is None:
        raise ValueError(
            f"reference {reference!r} is empty; give the right answer, or ask for no correctness"
        )
    return canonicalise(answer) == canonical_reference


_SINGLE_LETTER = re.compile(r"\(?([a-z])\)?")
_TIGHT_COMMA = re.compile(r",(?=\S)")
_LATEX_SPACING = re.compile(r"\\(?:left|right)(?![a-z])|\\[!,;:()\[\]]")
_LATEX_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|fbox)\{([^{}]*)\}")


def _without_markup(text: str) -> str:
    """Strip until nothing changes: each step may uncover what another one removes."""
    before = None
    while text != before:
        before = text
        text = _LATEX_WRAPPER.sub(r"\1", _LATEX_SPACING.sub("", text))
        text = " ".join(text.replace("{,}", ",").replace("−", "-").split())
        text = text.lstrip(' #*_`"$').rstrip(' *_`"$.,;:')
    return text


_VALUE = rf"(?:\\?\$)?({_DECIMAL})"
_FRACTION = re.compile(
    rf"([-+]?) ?(?:{_VALUE}(?: ?/ ?({_DECIMAL}))?"
    rf"|\\[dt]?frac\{{(-?{_DECIMAL})\}}\{{({_DECIMAL})\}}) ?(?:\\?%)?"
)
_WIDE_EXPONENT = re.compile(r"e[-+]?[0-9]{3}")


def _parse_number(text: str) -> Fraction | None:
    if len(text) > _MAX_NUMBER_CHARS or _WIDE_EXPONENT.search(text):
        return None
    parts = _FRACTION.fullmatch(text)
    if parts is None:
        return None
    sign, *values = parts.groups()
    numerator, *denominators = (Fraction(v.replace(",", "")) for v in values if v is not None)
    denominator = denominators[0] if denominators else Fraction(1)
    if denominator == 0:
        return None
    return numerator / denominator * (-1 if sign == "-" else 1)


def _spell(number: Fraction) -> str:
    one = 10**_DECIMAL_PLACES
    if one % number.denominator:
        return str(number)
    whole, places = divmod(abs(number.numerator) * (one // number.denominator), one)
    sign = "-" if number < 0 else ""
    return f"{sign}{whole}.{places:0{_DECIMAL_PLACES}}".rstrip("0").rstrip(".")
