"""Units behind a value, each with one spelling: centimeters and cm, dollars and $, inches^2.

What counts things is a unit too: 12 apples are 12, and not 12 oranges.
"""

from __future__ import annotations

import re

# Spellings by the one that is used; plurals without their s. Single letters only in `\text{…}`.
_SPELLINGS = {
    "%": "percent percentage pct",
    "$": "dollar usd buck",
    "€": "euro eur",
    "£": "pound-sterling gbp",
    "°": "degree deg",
    "cent": "¢",
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram kilo",
    "lb": "pound",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "gal": "gallon",
    "ms": "millisecond",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "mi/h": "mph",
    "km/h": "kmh kph kmph",
    "n": "newton",
    "j": "joule",
    "kj": "kilojoule",
    "w": "watt",
    "kw": "kilowatt",
    "v": "volt",
    "hz": "hertz",
    "pa": "pascal",
    "k": "kelvin",
    "°C": "celsius",
    "°F": "fahrenheit",
    "rad": "radian",
    "th": "st nd rd",
}
_SYMBOL = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
_KNOWN = _SYMBOL.keys() | {"per"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
# Words behind a number that make another number or statement of it.
_NO_UNITS_TEXT = (
    "hundred thousand million billion trillion dozen half halve third quarter fourth fifth sixth "
    "seventh eighth ninth tenth hundredth thousandth factorial mod modulo base choose time plus "
    "minus divided over root sqrt pi infinity and nor not none all any than less more fewer if for "
    "when where with without each every either remainder sin cos tan cot sec csc log exp min max "
    "gcd lcm det dim point power the both except but other only real true false yes undefined "
    "solution such that who which is are was were have has"
)
_NO_UNITS = frozenset(_NO_UNITS_TEXT.split())
_MAX_WORDS = 4

_TEXT = r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|rm|operatorname)\s?\{([^{}]*)\}"
_POWER = r"(?:\^\s?\{?\s?([23])\s?\}?)?"
_SPACES = r"(?:\\[,;:! ]|~|\s)"
_IN_TEXT = re.compile(rf"{_TEXT}\s?{_POWER}$")
_IN_PLAIN = re.compile(rf"(?<=[\d)}}\]\s$])([A-Za-z][A-Za-z./ ]*)\s?{_POWER}$")
_SIGN_BEHIND = re.compile(r"(?:(\\?%)|(\\?\$)|(?:\^\s?\{?\s?\\circ\s?\}?|\\degree|°)\s?([CF])?)$")
_CURRENCY = re.compile(r"([-+]?)\s?(?:US)?(?:\\?\$|([€£]))\s?(?=[\d.\\])")
_ORDINAL = re.compile(r"(?<=\d)\s?(?:\^\s?\{?)?\s?(?:st|nd|rd|th)\s?\}?$")
_HAS_VALUE = re.compile(r"\d|\\(?:pi|sqrt|frac)(?![A-Za-z])")


def split_unit(text: str) -> tuple[str, str]:
    """Return the value and the unit, "" where there is none; what is no value has none.

    >>> split_unit("5\\\\text{ cm}"), split_unit("864 inches^2"), split_unit("$5.40")
    (('5', 'cm'), ('864', 'in^2'), ('5.40', '$'))
    >>> split_unit("2 million"), split_unit("5x")
    (('2 million', ''), ('5x', ''))
    """
    if (money := _CURRENCY.match(text)) and "$" not in text[money.end() :]:
        return money[1] + text[money.end() :], money[2] or "$"
    value, unit = _split_behind(text)
    value = re.sub(rf"{_SPACES}+$", "", value.rstrip())
    if unit is None or not _HAS_VALUE.search(value):
        return text, ""
    return value, unit


def spell_unit(unit: str) -> str:
    """Return the LaTeX of a unit behind its value."""
    signs = {"": "", "%": "\\%", "°": "^\\circ"}
    return signs.get(unit, f"\\text{{{unit}}}")


def _split_behind(text: str) -> tuple[str, str | None]:
    if sign := _SIGN_BEHIND.search(text):
        percent, dollar, scale = sign.groups()
        return text[: sign.start()], "%" if percent else "$" if dollar else "°" + (scale or "")
    if ordinal := _ORDINAL.search(text):
        return text[: ordinal.start()], "th"
    if words := _IN_TEXT.search(text):
        return text[: words.start()], _unit(words[1], words[2], is_text=True)
    if words := _IN_PLAIN.search(text):
        return text[: words.start()], _unit(words[1], words[2], is_text=False)
    return text, None


def _unit(phrase: str, power: str | None, *, is_text: bool) -> str | None:
    """Return the spelling of a unit, "" for "units", None for what is none."""
    if phrase.strip() in _SYMBOL.values() and (is_text or len(phrase.strip()) > 1):
        return phrase.strip() + (f"^{power}" if power else "")
    words = phrase.casefold().replace(".", " ").replace("/", " per ").split()
    has_variables = not is_text and "per" not in words and any(len(word) == 1 for word in words)
    if not 1 <= len(words) <= _MAX_WORDS or has_variables:
        return None
    powers = [_POWERS[word] for word in words if word in _POWERS]
    names = [_singular(word) for word in words if word not in _POWERS]
    if any(name in _NO_UNITS or (name not in _KNOWN and len(name) < 3) for name in names):
        return None
    spelled = " ".join(_SYMBOL.get(name, name) for name in names if name != "unit")
    spelled = spelled.replace(" per ", "/").replace("° °", "°")
    exponent = power or (str(powers[0]) if powers else "")
    return f"{spelled}^{exponent}" if spelled and exponent else spelled


def _singular(word: str) -> str:
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
    return word[:-1] if is_plural else word
