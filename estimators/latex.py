"""The tokens of mathematics in LaTeX or plain text, each in one spelling, without layout.

Besides: which commas separate thousands (`join_thousands`), and which separate the parts of a list
(`split_list`). All of it is linear in the text.
"""

from __future__ import annotations

import re


class UnreadableError(ValueError):
    """Brackets do not match or nest too deep, or a command lacks its arguments."""


# --- characters and commands

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/",
        "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ",
        "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
        "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ",
        "→": "\\to ", "…": "\\dots ", "′": "'", "’": "'", "\u00a0": " ", "\u202f": " ",
        "\u2009": " ", "\u200b": "", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5",
        "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8",
    }
)  # fmt: skip
_SIGNS = {"<=": "\\le ", ">=": "\\ge ", "!=": "\\ne ", "+/-": "\\pm ", "->": "\\to "}
_STARS = re.compile(r"(?<=[\w)}\]])\*\*(?=[\w({\\-])")
_DOTS = re.compile(r"(?<=[0-9,+ ])\.\.\.")
_SPELLINGS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le",
    "\\leqslant": "\\le", "\\geq": "\\ge", "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<",
    "\\gt": ">", "\\div": "/", "\\ast": "*", "\\cdot": "*", "\\mid": "|", "\\vert": "|",
    "\\lvert": "|", "\\rvert": "|", "\\colon": ":", "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\lbrack": "[", "\\rbrack": "]", "\\rightarrow": "\\to", "\\varnothing": "\\emptyset",
    "\\ldots": "\\dots", "\\cdots": "\\dots", "\\prime": "'", "\\R": "\\mathbb{R}", "%": "\\%",
    "\\lparen": "(", "\\rparen": ")",
    "\\implies": "\\Rightarrow", "\\land": "\\wedge", "\\lor": "\\vee",
    "infinity": "\\infty", "inf": "\\infty", "sqrt": "\\sqrt", "pi": "\\pi",
}  # fmt: skip
_LAYOUT_TEXT = (
    "\\left \\right \\middle \\big \\Big \\bigg \\Bigg \\bigl \\bigr \\Bigl \\Bigr \\biggl \\biggr "
    "\\quad \\qquad \\displaystyle \\textstyle \\limits \\nolimits \\, \\; \\: \\! \\( \\) \\[ "
    "\\] ~ $ `"
)
_LAYOUT = frozenset(_LAYOUT_TEXT.split()) | {"\\ "}
_FUNCTIONS_TEXT = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp min max gcd lcm det "
    "dim deg arg sup lim mod sqrt inf"
)
FUNCTIONS = frozenset(_FUNCTIONS_TEXT.split())
_RELATIONS_TEXT = (
    "\\le \\ge \\ne \\to \\in \\notin \\cup \\cap \\pm \\mp \\subset \\subseteq \\setminus \\equiv "
    "\\approx \\sim \\Rightarrow \\Leftrightarrow \\iff \\wedge \\vee \\neg \\times \\circ "
    "\\forall \\exists \\perp \\parallel"
)
RELATIONS = frozenset(_RELATIONS_TEXT.split())
_SYMBOLS_TEXT = (
    "\\alpha \\beta \\gamma \\delta \\epsilon \\varepsilon \\zeta \\eta \\theta \\iota \\kappa "
    "\\lambda \\mu \\nu \\xi \\pi \\rho \\sigma \\tau \\phi \\varphi \\chi \\psi \\omega \\Gamma "
    "\\Delta \\Theta \\Lambda \\Xi \\Pi \\Sigma \\Phi \\Psi \\Omega \\infty \\emptyset \\dots "
    "\\angle \\triangle \\frac \\sqrt \\sum \\prod \\int \\binom"
)
SYMBOLS = frozenset(_SYMBOLS_TEXT.split())
_COMMANDS = (
    frozenset(f"\\{name}" for name in FUNCTIONS) | RELATIONS | SYMBOLS | _LAYOUT
    | {name for name in _SPELLINGS if name.startswith("\\")}
)  # fmt: skip

NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_TOKEN = re.compile(rf"\s+|\\[A-Za-z]+|\\.|{NUMBER}|[A-Za-z]+|.", re.DOTALL)


def tokenize(text: str) -> list[str]:
    """Return the tokens of a text, each in its one spelling, without spaces and layout."""
    tokens = []
    is_bracket = False
    for token in _TOKEN.findall(text):
        for part in _split_command(token):
            part = _SPELLINGS.get(part, part)
            if not (is_bracket and part == ".") and not part.isspace() and part not in _LAYOUT:
                tokens.append(part)
            is_bracket = part in ("\\left", "\\right")
    return tokens


def _split_command(token: str) -> list[str]:
    """Split what is a known command and letters behind it, where a space was lost: \\cotx."""
    if not token.startswith("\\") or token in _COMMANDS or not token[1:].isalpha():
        return [token]
    for end in range(len(token) - 1, 2, -1):
        if token[:end] in _COMMANDS:
            return [token[:end], token[end:]]
    return [token]


def translate(text: str) -> str:
    """Return the text with signs that LaTeX has a command for, as that command."""
    text = text.translate(_CHARACTERS)
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    return _DOTS.sub(r"\\dots ", _STARS.sub("^", text))


# --- thousands

_SEPARATOR = re.compile(
    r"(?<=[0-9])\s?(?:\{,\}|,\s?\\!|\\!\s?,|\\[,;: ]|~)\s?(?=[0-9]{3}(?![0-9]))"
)
_COMMAS = re.compile(r"\\[{}]|[()\[\]]|(?<![0-9.])[0-9]{1,3}(?:,[0-9]+)+")
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+")
_SPACED = re.compile(r"([-+]?[1-9][0-9]{0,2})((?:\s[0-9]{3})+)(?![0-9])(.*)", re.DOTALL)


def join_thousands(text: str) -> str:
    """Remove what separates thousands; a comma in brackets does only where others have a space.

    >>> join_thousands("1,234"), join_thousands("(1,234)"), join_thousands("(1,234, 5)")
    ('1234', '(1,234)', '(1234, 5)')
    """
    text = _SEPARATOR.sub("", text)
    if (spaced := _SPACED.fullmatch(text)) and not spaced[3].lstrip().startswith("/"):
        text = spaced[1] + "".join(spaced[2].split()) + spaced[3]
    depth, is_spaced = 0, ", " in text

    def join(match: re.Match[str]) -> str:
        nonlocal depth
        run = match[0]
        if not run[0].isdigit():
            depth += 1 if run in ("(", "[", "\\{") else -1
        elif _THOUSANDS.fullmatch(run) and (depth <= 0 or is_spaced or ",0" in run):
            return run.replace(",", "")
        return run

    return _COMMAS.sub(join, text)


# --- lists

OPENING = {"(": ")]", "[": ")]", "{": "}", "\\{": ("\\}",)}
CLOSING = frozenset((")", "]", "}", "\\}"))


def split_list(text: str) -> list[str]:
    """Return the parts of a text between its commas, semicolons, "and" and "or" outside brackets.

    Raises:
        UnreadableError: brackets do not match.
    """
    parts, start, depth, end = [], 0, 0, len(text)
    for match in _TOKEN.finditer(text):
        token = _SPELLINGS.get(match[0], match[0])
        depth += (token in OPENING) - (token in CLOSING)
        if depth < 0:
            raise UnreadableError(text)
        if depth == 0 and token in (",", ";", "and", "or"):
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:end])
    return [part.strip() for part in parts if part.strip()]
