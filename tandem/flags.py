"""Flags that are made from a model of settings: `serve` and `loadtest run` have one per field.

Imports neither room of the server, so that a load test needs none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def with_parameters(
    command: Callable[..., None], parameters: Iterable[inspect.Parameter]
) -> Callable[..., None]:
    """Let typer see these parameters in the place of a command's `**flags`."""
    found = inspect.signature(command, eval_str=True).parameters.values()
    own = [each for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD]
    vars(command)["__signature__"] = inspect.Signature([*own, *parameters])
    return command
