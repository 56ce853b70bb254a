"""Flags that are made from a model of settings: `serve` and `loadtest run` have one per field.

Imports neither room of the server, so that a load test needs none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


class FlagWords(NamedTuple):
    """How a flag is spelled, what kind of value it takes, and its default, empty without one."""

    flag: str
    metavar: str | None
    default: str


def with_flags(
    command: Callable[..., None],
    fields: Mapping[str, FieldInfo],
    sections: Mapping[str, str],
    words_of: Callable[[str], FlagWords],
) -> Callable[..., None]:
    """Let a command's `**flags` be one flag for each field; None is one that was not given.

    A field that is true or false is a switch, others are text. `sections` of the help are given by
    their first fields.
    """
    found = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [each for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD]
    section = ""
    for name, field in fields.items():
        section, words = sections.get(name, section), words_of(name)
        option = typer.Option(
            words.flag,
            help=" ".join((field.description or "").split()),
            metavar=words.metavar,
            show_default=words.default or False,
            rich_help_panel=section,
        )
        is_switch = field.annotation is bool
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[bool | None if is_switch else str | None, option],
            )
        )
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command
