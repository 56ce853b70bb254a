"""The child process of `equivalence`: work on untrusted text that may hang, crash or swell.

It is started as a script and needs nothing but the standard library and, where it is installed,
math-verify: it has neither torch nor grpc to load, and no threads to fork.

Jobs come and results go over the socket that is its standard input, as JSON behind its length in 4
bytes.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct(">I")

_OPERATOR = re.compile(r"(?<![\\a-z])(?:sin|cos|tan|cot|sec|csc|ln|log|exp|pi|min|max)(?![a-z])")


def are_equivalent(gold: str, answer: str) -> bool:
    """Say whether math-verify finds two expressions equivalent; not when it cannot read them.

    Its own limits are off, as they rest on a signal and a Python handler: a regular expression or a
    power of large integers never lets the handler run. Units are kept. As `verify` depends on which
    of the two is the gold one, it is asked both ways, and one yes is enough.

    Raises:
        MemoryError: nothing can be relied on any more.

    >>> are_equivalent("(x+1)^2", "x^2+2x+1"), are_equivalent("5 km", "5")
    (True, False)
    >>> are_equivalent("1+", "1")
    False
    """
    import math_verify  # type: ignore[import-untyped]

    try:
        readings = [_read(text) for text in (gold, answer)]
        return _are_close(*readings) and any(
            math_verify.verify(*pair, timeout_seconds=None, raise_on_error=True)
            for pair in (readings, readings[::-1])
        )
    except MemoryError:
        raise
    except Exception:  # its parsers on untrusted text: there is no list of what they raise
        return False


def _are_close(gold: list[Any], answer: list[Any]) -> bool:
    """Say whether two numbers are equal in 12 digits: `verify` compares 6 decimals of 1/2^99 too.

    True where one of them is no number.
    """
    if not (gold and answer) or not all(
        getattr(v, "is_number", False) for v in (gold[0], answer[0])
    ):
        return True
    one, other = (value.evalf(30) for value in (gold[0], answer[0]))
    return bool(abs(one - other) <= 1e-12 * max(abs(one), abs(other)))


def _read(text: str) -> list[Any]:
    """Return what math-verify makes of an expression: one element, or none."""
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    latex = _OPERATOR.sub(r"\\\g<0>", text).replace("**", "^").replace("$", "")
    readings: list[Any] = parse(
        f"${latex}$",
        [LatexExtractionConfig(normalization_config=normalization)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return readings


def extract(pattern: str, text: str) -> str | None:
    """Return group 1 of the pattern's last match; None where there is none, or that lacks it.

    The pattern has such a group (`serve.pair.answers.formats` sees to it).

    >>> extract("= ([0-9]+)", "1 + 1 = 2, so 2 + 2 = 4"), extract("x|(y)", "yx")
    ('4', None)
    """
    answer: str | None = None
    for match in re.finditer(pattern, text):
        answer = match[1]
    return answer


def prepare(name: str) -> None:
    """Import what the function of that name needs."""
    if name == "equivalent":
        are_equivalent("1", "1")


_FUNCTIONS: dict[str, Callable[..., bool | str | None]] = {
    "prepare": prepare,
    "equivalent": are_equivalent,
    "extract": extract,
}


def main() -> None:
    """Serve jobs until the socket closes; each one ends the process when it runs too long."""
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(0, "rb", closefd=False) as jobs, open(0, "wb", closefd=False) as results:
        while header := jobs.read(HEADER.size):
            job = json.loads(jobs.read(*HEADER.unpack(header)))
            # The parent ends a job in time; the alarm is for when there is no parent any more.
            signal.setitimer(signal.ITIMER_REAL, job["alarm_s"])
            result = _FUNCTIONS[job["name"]](*job["arguments"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            message = json.dumps(result).encode()
            results.write(HEADER.pack(len(message)) + message)
            results.flush()


if __name__ == "__main__":
    main()
