from __future__ import annotations

import math
from typing import Any

import pytest

from bundle.yaml_file import YamlError, parse_yaml

TEXT = b"""\
base: &base {bits: 4, block_size: 32}
variants:
  small:
    <<: *base
    block_size: 64
  large: {bits: 8}
phases:
  - alpha: 1
  - alpha: 2
    beta: no
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: -1E5", {"a": -1e5}),
        ("a: 0.5", {"a": 0.5}),
        ("a: .inf", {"a": math.inf}),
        ("a: 0x1f", {"a": 31}),
        ("a: '010'", {"a": "010"}),
        ("a: no", {"a": False}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("x: &x {a: 1, b: 1}\ny: {<<: *x, a: 2}", {"x": {"a": 1, "b": 1}, "y": {"a": 2, "b": 1}}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("# nothing", None),
        ("", None),
    ],
)
def test_text_is_read_as_it_is_meant(text: str, value: Any) -> None:
    assert parse_yaml(text.encode()).value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"line 3: 'a' is given twice, first on line 1$"),
        ("a: {b: 1, b: 2}", r"line 1: 'b' is given twice, first on line 1$"),
        ("a:\n- b: 1\n  b: 1", r"line 3: 'b' is given twice, first on line 2$"),
        ('{"a": 1,\n"a": 1}', r"line 2: 'a' is given twice, first on line 1$"),
        ("a: 1\na: 2\nb: 010\n", r"line 2: 'a' is given twice.*; line 3: 010 is an octal number"),
        ("a: 1:30", r"line 1: 1:30 is a number of base 60"),
        ("a: 1:30.5", r"line 1: 1:30\.5 is a number of base 60"),
        ("a:\n\t- b", r"line 2: .*cannot start any token; indent with spaces"),
        ("a: 1\n---\nb: 2", r"line 2: a second document begins"),
        ("a: [\n1", r"line 2: while parsing a flow sequence"),
        ("a:\n  b: *c", r"line 2: found undefined alias 'c'"),
        ("? [a, b]\n: c", r"line 1: a key is no list"),
        ("a: b\nc: \x01", r"line 2: '\\x01' is not allowed"),
        ("a: 2026-13-45", r"line 1: '2026-13-45' is not what it looks like: month must be"),
        ("a: !!int x", r"line 1: 'x' is not what it looks like"),
        ("a: !!set [1]", r"line 1: expected a mapping node"),
        ("a: !!python/object:os.system x", r"line 1: could not determine a constructor"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_text_that_would_be_misread_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        parse_yaml(text.encode())


def test_bytes_that_are_not_utf8_are_refused_with_their_line() -> None:
    with pytest.raises(YamlError, match="line 2: not UTF-8"):
        parse_yaml(b"a: 1\nb: caf\xe9")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ([], 1),
        (["variants", "small", "block_size"], 5),
        (["variants", "small", "bits"], 1),
        (["variants", "large", "rtn", "bits"], 6),
        (["variants", "large", "missing"], 6),
        (["phases", 1, "beta"], 10),
        (["phases", 7], 7),
        (["nowhere", "at", 0], 1),
    ],
)
def test_line_is_that_of_the_value_or_of_what_should_hold_it(
    keys: list[str | int], line: int
) -> None:
    assert parse_yaml(TEXT).line_of(keys) == line


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        (["variants", "large", "rtn", "bits"], "variants.large.bits"),
        (["variants", "large", "rtn", "missing"], "variants.large"),
        (["phases", 1, "beta"], "phases.1.beta"),
        ([], ""),
    ],
)
def test_path_has_the_keys_that_are_in_the_text(keys: list[str | int], path: str) -> None:
    assert ".".join(parse_yaml(TEXT).path_of(keys)) == path


def test_spelling_is_that_of_a_plain_scalar() -> None:
    document = parse_yaml(b"a: no\nb: 'no'\nc: [no]")
    assert document.source_of(["a"]) == document.source_of(["c", 0]) == "no"
    assert document.source_of(["b"]) is document.source_of(["c"]) is None
