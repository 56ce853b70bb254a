"""Answers in free text: where they stand (`extract`), and whether they are right (`is_correct`).

Which answers are the same is the business of `estimators.canonical`. The text is untrusted and may
be long: every pattern here repeats only over characters that cannot begin what follows them, so the
work is linear in the text.

One way to a vote: `majority_vote(canonicalise(extract(text, "boxed")) for text in texts)`.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from estimators.canonical import canonicalise, is_same

REASONING_BEGINS, REASONING_ENDS = "<think>", "</think>"

# 1,234.5  .5  6e-3: thousands separators only where they separate thousands.
_DECIMAL = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


# Where an answer stands


def behind_reasoning(text: str, *, starts_inside: bool = False) -> str | None:
    """Return what follows the last reasoning in a completion; None when that never ends.

    Args:
        starts_inside: whether the prompt opened the reasoning, so that `text` has its end only.

    >>> behind_reasoning("<think>5? No.</think>It is 6."), behind_reasoning("<think>5? Or")
    ('It is 6.', None)
    >>> behind_reasoning("5? No.</think>It is 6."), behind_reasoning("5? Or", starts_inside=True)
    ('It is 6.', None)
    """
    end = text.rfind(REASONING_ENDS)
    if text.rfind(REASONING_BEGINS) > end or (starts_inside and end < 0):
        return None
    return text if end < 0 else text[end + len(REASONING_ENDS) :]


def opens_reasoning(prompt: str) -> bool:
    """Return whether a prompt's last words open the reasoning, as templates of R1 and Qwen3 do.

    >>> opens_reasoning("<|Assistant|><think>\\n"), opens_reasoning("What is <think>? Answer:")
    (True, False)
    """
    return prompt.rstrip().endswith(REASONING_BEGINS)


def extract(text: str, answer_format: str, *, starts_in_reasoning: bool = False) -> str | None:
    """Return the answer in `text` as it is written there, or None when there is none.

    It is read behind the reasoning (`behind_reasoning`): a completion that was cut off in it has
    none, whatever stands in there. The formats are the keys of `ANSWER_FORMATS`:

    * `none`: there is nothing to extract.
    * `last_number`: the last number, 3/4 and 12 3/4 included, without currency or percent.
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
    answer_text = behind_reasoning(text, starts_inside=starts_in_reasoning)
    return None if answer_text is None else ANSWER_FORMATS[answer_format](answer_text)


def _no_answer(text: str) -> None:
    return None


# A minus belongs to the number unless it subtracts; digits inside a word (x2, H2O) are no number.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])[-+−])?\$?(?<![A-Za-z0-9_])"
    rf"(?:[0-9]{{1,9}} [0-9]{{1,9}}/[0-9]{{1,9}}|{_DECIMAL}(?: ?/ ?{_DECIMAL})?)",
    re.ASCII,
)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text.replace("{,}", ",").replace(",\\!", ","))
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


# Whether they are right


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
    canonical = canonicalise(answer)
    return canonical is not None and is_same(canonical, canonical_reference)
