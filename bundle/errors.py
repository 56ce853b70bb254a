"""The errors whose text is all that a user needs: the command line prints it without a traceback.

UserError
├── UsageError       a command was called in a wrong way: exit code 2
├── BundleError      a bundle on disk is not what its manifest says
└── ModelFolderError a folder of a model cannot be used, or could lead out of itself

`export` and the commands derive their own expected errors from `UserError`.
"""

from __future__ import annotations


class UserError(Exception):
    """What was given, what is allowed and what to do, in one line that may be shown as it is."""

    exit_code = 1


class UsageError(UserError):
    """A command was called in a wrong way; the text says which one is right."""

    exit_code = 2


class BundleError(UserError):
    """A bundle is damaged, incomplete, unsafe or of another schema; the text names the file."""


class ModelFolderError(UserError):
    """A model's folder is damaged, unsafe or of a kind that is not supported; the text names it."""


def one_line(text: str) -> str:
    """Return text that cannot break out of its line, nor steer a terminal: a file's name may.

    >>> one_line("a"), one_line("a\\nb")
    ('a', "'a\\\\nb'")
    """
    return text if text.isprintable() else ascii(text)
