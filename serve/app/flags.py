"""The flags of `tandem serve`: one for each field of ServeConfig, made from it.

A flag that was not given is None, so that environment and file may still speak. Values are taken
as text and parsed with those of the other sources (`serve.app.settings`), so that all errors are
reported together and alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args, get_origin

from serve.app.config import ServeConfig
from serve.app.settings import flag_of, is_collection, to_json, types_of
from tandem.flags import METAVARS, FlagWords, with_flags

# Sections of the help and of docs/serve.md, each by its first field.
SECTIONS = {
    "bundle": "Models",
    "teacher_timeout_s": "Remote teacher",
    "host": "Listeners",
    "tls_cert": "Security",
    "max_num_seqs": "Engines",
    "max_prompt_bytes": "Limits of requests",
    "student_weight": "Traffic",
    "tasks": "Answers, metrics, log",
    "drain_delay_s": "Shutdown",
}


def with_settings_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command's `**flags` be one flag for each field of ServeConfig, named alike."""
    return with_flags(command, ServeConfig.model_fields, SECTIONS, _words_of)


def _words_of(name: str) -> FlagWords:
    if ServeConfig.model_fields[name].annotation is bool:
        return FlagWords(_switch_of(name), None, default_of(name))
    return FlagWords(flag_of(name), metavar_of(name), default_of(name))


def _switch_of(name: str) -> str:
    """Return both flags of a setting that is true or false.

    >>> _switch_of("reflection"), _switch_of("no_teacher")
    ('--reflection/--no-reflection', '--no-teacher/--with-teacher')
    """
    opposite = f"with_{name[3:]}" if name.startswith("no_") else f"no_{name}"
    return f"{flag_of(name)}/{flag_of(opposite)}"


def metavar_of(name: str) -> str:
    """Return what kind of text a flag takes: the choices where there are few."""
    kind = types_of(name)[0]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "JSON" if is_collection(name) else METAVARS[kind]


def default_of(name: str) -> str:
    """Return the default as help and docs show it; empty where there is none."""
    field = ServeConfig.model_fields[name]
    default = field.get_default(call_default_factory=True)
    has_default = not field.is_required() and default is not None
    return to_json(default).strip('"') if has_default else ""
