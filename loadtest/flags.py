"""The flags of `tandem loadtest run`: one for each field of RunConfig, made from it.

They are named as the fields are, less the unit: `--rates` for `rates_rps`. A list is joined by
commas. Values are taken as text and parsed by RunConfig, so that all errors are told together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from bundle.errors import UsageError
from loadtest.config import RunConfig
from tandem.flags import METAVARS, FlagWords, with_flags

# Sections of the help, each by its first field.
SECTIONS = {
    "target": "What is tested",
    "dataset": "What is asked",
    "arrival": "How it is asked",
    "slo": "What it must meet",
    "processes": "Client",
}


def parse_config(flags: Mapping[str, str | None]) -> RunConfig:
    """Return the settings of a run; a flag that is None was not given. UsageError."""
    given = {
        name: [part.strip() for part in value.split(",")] if _is_list(name) else value
        for name, value in flags.items()
        if value is not None
    }
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise UsageError("\n".join(_explain(each, flags) for each in found)) from None


def _explain(error: ErrorDetails, flags: Mapping[str, str | None]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{flag_of(name)}: is required: {RunConfig.model_fields[name].description}"
    given = flags.get(name)
    return f"{flag_of(name)}: {message}" + ("" if given is None else f", got {given!r}")


def with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command's `**flags` be one flag for each field of RunConfig."""
    return with_flags(command, RunConfig.model_fields, SECTIONS, _words_of)


def _words_of(name: str) -> FlagWords:
    return FlagWords(flag_of(name), _metavar_of(name), _default_of(name))


def flag_of(name: str) -> str:
    """Return the flag of a setting.

    >>> flag_of("rates_rps"), flag_of("max_tokens"), flag_of("duration_s")
    ('--rates', '--max-tokens', '--duration')
    """
    return "--" + name.removesuffix("_rps").removesuffix("_s").replace("_", "-")


def _kinds(name: str) -> tuple[Any, ...]:
    """Return the types that a setting may have besides None, of a list its elements'."""
    annotation = RunConfig.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    return tuple(kind for kind in kinds or (annotation,) if kind not in (NoneType, Ellipsis))


def _is_list(name: str) -> bool:
    return get_origin(RunConfig.model_fields[name].annotation) is tuple


def _metavar_of(name: str) -> str:
    kind = _kinds(name)[0]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return f"{METAVARS[kind]},…" if _is_list(name) else METAVARS[kind]


def _default_of(name: str) -> str:
    """Return the default as a flag would say it; empty where there is none."""
    default = RunConfig.model_fields[name].default
    if default is None or default is PydanticUndefined:
        return ""
    return ",".join(map(str, default)) if _is_list(name) else str(default)
