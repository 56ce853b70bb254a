"""YAML that people write: each name given once, and for every value the line on which it stands.

PyYAML reads YAML 1.1 and takes the last of two equal keys. Its numbers are not what most people
expect: `1e-4` is text, `010` is 8, `1:30` is 90. Here a key given twice and the two spellings of
numbers are refused, and `1e-4` is a number. JSON is YAML, so it is read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_MERGE = "tag:yaml.org,2002:merge"


Fault = tuple[int, str]
"""A line, from 1, and what is wrong there."""


class YamlError(ValueError):
    """A text is not YAML, or says something that would be read as something else."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"line {line}: {text}" for line, text in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """The value of a text, None for an empty one."""

    value: Any
    _root: yaml.Node | None = field(repr=False)

    def line_of(self, keys: Iterable[str | int]) -> int:
        """Return the line, from 1, of the value below these keys and indices.

        Keys that are not in the text are left out, so that a missing one has its section's line.

        >>> parse_yaml(b"a:\\n  - b: 1\\n    c: 2\\n").line_of(["a", 0, "c"])
        3
        """
        return self._walk(keys)[0]

    def path_of(self, keys: Iterable[str | int]) -> list[str]:
        """Return those of the keys that are in the text."""
        return self._walk(keys)[1]

    def source_of(self, keys: Iterable[str | int]) -> str | None:
        """Return how the plain scalar below the keys is spelled, None where there is none."""
        node = self._walk(keys)[2]
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return str(node.value) if is_plain and node is not None else None

    def _walk(self, keys: Iterable[str | int]) -> tuple[int, list[str], yaml.Node | None]:
        """Return line, keys and node of the deepest value of which the text has all keys."""
        node, found = self._root, []
        line = 1 if node is None else node.start_mark.line + 1
        for key in keys:
            name, child = _child(node, key)
            if child is not None:
                node = child
                found.append(str(key))
                line = (child if name is None else name).start_mark.line + 1
        return line, found, node


def parse_yaml(data: bytes) -> YamlDocument:
    """Return the one document of a text, which begins with a byte order mark or not. YamlError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise YamlError([(line, f"not UTF-8: {error.reason}")]) from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        value = None if root is None else loader.construct_document(root)
    except RecursionError:
        raise YamlError([(1, "nested too deeply")]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlError([(line, f"{text[error.position]!a} is not allowed")]) from None
    except yaml.MarkedYAMLError as error:
        raise YamlError([_fault(error)]) from None
    if loader.faults:
        raise YamlError(sorted(loader.faults))
    return YamlDocument(value, root)


def _fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    assert mark is not None, error
    said = " ".join(filter(None, (error.context, error.problem)))
    if "'\\t' that cannot start" in said:
        said += "; indent with spaces"
    if error.context == "expected a single document in the stream":
        said = "a second document begins; one file is one document"
    return mark.line + 1, said


def _child(node: yaml.Node | None, key: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Return the node of a key and of its value; of an index the value alone."""
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return None, node.value[key]
    if isinstance(node, yaml.MappingNode):
        # Merged pairs come first, and the mapping's own ones hold.
        for name, value in reversed(node.value):
            if isinstance(name, yaml.ScalarNode) and name.value == str(key):
                return name, value
    return None, None


class _Loader(yaml.SafeLoader):
    """See the module. `faults` are those that let the rest of the text be read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[Fault] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key is no list and no mapping", key)
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                self.faults.append((line, f"{name!r} is given twice, first on line {lines[name]}"))
            lines.setdefault(name, line)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError) as error:  # a date, or what !!int says
            raise _refusal(f"{node.value!r} is not what it looks like: {error}", node) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        if _OCTAL.fullmatch(text):
            self._note_ambiguous("an octal number", node)
        elif ":" in text:
            self._note_ambiguous("a number of base 60", node)
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if ":" in str(node.value):
            self._note_ambiguous("a number of base 60", node)
        return float(super().construct_yaml_float(node))

    def _note_ambiguous(self, meaning: str, node: yaml.ScalarNode) -> None:
        text = f"{node.value} is {meaning} in YAML 1.1: put it in quotes, or write it plainly"
        self.faults.append((node.start_mark.line + 1, text))


def _refusal(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
