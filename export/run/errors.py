"""Why an export cannot go on: errors for people, and the exit code of each.

UserError                     1
└── ExportError               1   a step cannot go on
    ├── ConfigError           2   a recipe is wrong
    ├── GateError             3   no variant passed its gates (`export.publish.select`)
    ├── InputChangedError     4   another input than the run began with (`export.record`)
    └── InterruptedRunError   5   told to stop (`export.cli`)
"""

from __future__ import annotations

from collections.abc import Sequence

from bundle.errors import UserError


class ExportError(UserError):
    """An export cannot go on; the text says why and what to do."""


class ConfigError(ExportError):
    """A recipe is wrong; a line for each fault names the key, its value and what is allowed."""

    exit_code = 2


Fault = tuple[str, str]
"""A dotted key of a recipe and what is wrong with it."""


class ContradictionError(ValueError):
    """Options that are right by themselves cannot go together."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{key} {text}" for key, text in faults))
        self.faults = tuple(faults)
