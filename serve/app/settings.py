"""Where a server's settings come from: flags, the environment, a file, the defaults of ServeConfig.

The first of them that names a setting wins. A name that is not known is refused wherever it
stands, since a typo in a limit must not leave the default in force. What is wrong is reported
together, a line each: where it was given, what it was, what is allowed.

By hand, because pydantic-settings says neither which source a value came from nor that a variable
is unknown, and takes longer to import than all of `tandem serve --help`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bundle.errors import UsageError
from bundle.yaml_file import parse_yaml
from serve.addresses import is_remote
from serve.app.config import ServeConfig

ENV_PREFIX = "TANDEM_"


# YAML refuses these, or takes them for line ends; within quotes their escapes are read.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was given, and where: `flag --port`, `env TANDEM_PORT`, `file x.yaml: port`."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force, and where those come from that are not defaults."""

    config: ServeConfig
    origins: Mapping[str, str]

    def to_yaml(self) -> str:
        """Return a config file that says the same from any folder, with each value's origin."""
        return "".join(
            f"{name}: {to_json(value)}  # {self.origins.get(name, 'default')}\n"
            for name, value in self.config
        )


def load_settings(
    flags: Mapping[str, str | bool | None], environ: Mapping[str, str], file: Path | None = None
) -> Settings:
    """Return the settings of a server; a flag that is None was not given. UsageError."""
    given = {
        **(_of_file(file) if file is not None else {}),
        **_of_environment(environ),
        **_of_flags(flags),
    }
    try:
        config = ServeConfig.model_validate({name: item.value for name, item in given.items()})
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise UsageError("\n".join(_explain(each, given) for each in found)) from None
    return Settings(config, {name: item.origin for name, item in given.items()})


def flag_of(name: str) -> str:
    """Return the flag of a setting: `max_num_seqs` is `--max-num-seqs`."""
    return f"--{name.replace('_', '-')}"


def env_of(name: str) -> str:
    """Return the environment variable of a setting: `max_num_seqs` is `TANDEM_MAX_NUM_SEQS`."""
    return f"{ENV_PREFIX}{name.upper()}"


def types_of(name: str) -> tuple[Any, ...]:
    """Return the types that a setting may have; none where there is no such setting.

    >>> types_of("threads"), types_of("host"), types_of("thread")
    ((<class 'int'>, <class 'NoneType'>), (<class 'str'>,), ())
    """
    if name not in ServeConfig.model_fields:
        return ()
    annotation = ServeConfig.model_fields[name].annotation
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def is_collection(name: str) -> bool:
    """Say whether flags and variables give a setting as JSON."""
    return any(get_origin(kind) not in (None, Literal) for kind in types_of(name))


# --- the sources


def _of_file(path: Path) -> dict[str, Given]:
    """Read YAML (JSON is some) or, by its suffix, TOML. Paths in it start at its folder."""
    folder = path.absolute().parent
    return {
        str(name): Given(_located(str(name), value, folder), f"file {path}: {name}")
        for name, value in _parsed_file(path).items()
    }


def _parsed_file(path: Path) -> dict[Any, Any]:
    try:
        data = path.read_bytes()
        is_toml = path.suffix == ".toml"
        parsed = tomllib.loads(data.decode("utf-8-sig")) if is_toml else parse_yaml(data).value
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"--config {path} cannot be parsed: nested too deeply") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path} cannot be parsed: {reason}") from None
    if parsed is None:  # nothing, or comments alone
        return {}
    if not isinstance(parsed, dict):
        raise UsageError(f"--config {path} holds {parsed!r}, not settings by their names")
    return parsed


def _of_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """Return the settings among the variables; those that are none keep their whole names."""
    names = {env_of(name): name for name in ServeConfig.model_fields}
    return {
        names.get(key, key): Given(_parsed(names.get(key, key), text), f"env {key}")
        for key, text in environ.items()
        if key.startswith(ENV_PREFIX)
    }


def _of_flags(flags: Mapping[str, str | bool | None]) -> dict[str, Given]:
    return {
        name: Given(_parsed(name, value), f"flag {flag_of(name)}")
        for name, value in flags.items()
        if value is not None
    }


def _parsed(name: str, value: str | bool) -> Any:
    """Return what a flag or a variable says, as a file would: `null`, JSON, or the text as it is.

    JSON that cannot be parsed stays text, which ServeConfig refuses.
    """
    if value == "null" and NoneType in types_of(name):
        return None
    if is_collection(name) and isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return _located(name, value, Path())


def _located(name: str, value: Any, folder: Path) -> Any:
    """Return a path below `folder`, `~` expanded; anything else as it is."""
    if Path not in types_of(name) or not isinstance(value, str) or is_remote(value):
        return value
    # Path.expanduser raises where the home is unknown; this leaves the text, which is then missed.
    return folder / os.path.expanduser(value)  # noqa: PTH111


# --- words


def _explain(error: ErrorDetails, given: Mapping[str, Given]) -> str:
    """Return one line about a value that ServeConfig refused."""
    text = error["msg"].removeprefix("Value error, ").replace("frozenset", "list")
    if not error["loc"]:  # of several settings together
        return text
    name, *inner = map(str, error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{given[name].origin}: there is no such setting{_nearest(name)}"
    place = ".".join([given[name].origin, *inner])
    is_form = error["type"] != "value_error"
    as_json = " as JSON" if is_form and is_collection(name) and not inner else ""
    return f"{place}: {text}{as_json}, got {_shown(error['input'])}"


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # hexadecimal YAML can say numbers that Python does not print
        return "a number of too many digits"


def _nearest(name: str) -> str:
    """Return a hint at what was meant, spelled as it was given; nothing without a likely one."""
    spell = env_of if name.startswith(ENV_PREFIX) else str
    bare = name.removeprefix(ENV_PREFIX).lower()
    found = difflib.get_close_matches(bare, ServeConfig.model_fields, n=1)
    return f"; did you mean {spell(found[0])}?" if found else ""


def to_json(value: Any) -> str:
    """Return a value on one line, which YAML reads as the same."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value.absolute())
    assert isinstance(value, frozenset), f"no setting is a {type(value).__name__}"
    return sorted(value)
