"""The one command: `tandem export | serve | ask | control | token | loadtest | demo | doctor`.

Only the package of the command that was asked for is imported, so that help is instant and a
broken GPU library does not keep `tandem doctor` from saying so. A command whose role is not
installed says in one line what to install.

Exit codes: 0 done, 1 an expected error (one line on stderr), 2 wrong usage or a wrong recipe, 3
what was asked for cannot be had: for `export` a gate failed, for `serve` the device is not there,
for `loadtest` a gate broke or the run is INVALID.
`loadtest` alone: 4 more requests failed than are allowed.
`export` alone: 4 an input changed since the run that is resumed, 5 interrupted (SIGINT, SIGTERM),
with everything finished kept.
"""

from __future__ import annotations

import codecs
import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NamedTuple

import typer

from bundle.errors import UserError
from serve.errors import TandemError
from tandem.roles import CLIENT, install_command

OWN_PACKAGES = {"bundle", "estimators", "export", "loadtest", "protos", "report", "serve", "tandem"}


class Command(NamedTuple):
    """Where a command lives, the line that `tandem --help` shows for it, the role it needs."""

    target: str
    summary: str
    role: str = CLIENT


COMMANDS: Mapping[str, Command] = {
    "demo": Command("tandem.demo:demo", "Distil, export, serve and ask a real model.", "export"),
    "export": Command("export.cli:app", "Turn a teacher into a verified bundle.", "export"),
    "serve": Command(
        "serve.cli:serve", "Serve a bundle's student, and its teacher, over gRPC.", "serve"
    ),
    "ask": Command("serve.client.ask:ask", "Ask a server; show both models' answers side by side."),
    "control": Command("serve.client.control:app", "See, steer, drain a server that runs."),
    "token": Command(
        "serve.rpc.credentials.cli:token", "Make a credential for a client of a server."
    ),
    "loadtest": Command(
        "loadtest.cli:app", "Student against teacher under load: faster, worse?", "loadtest"
    ),
    # Only the folders that it is given need more than a client has.
    "doctor": Command("tandem.doctor:doctor", "Say what is wrong with this installation.", "serve"),
}


def build_app(arguments: Sequence[str], commands: Mapping[str, Command] = COMMANDS) -> typer.Typer:
    """Return the app with the command that `arguments` ask for; the others are only named."""
    app = typer.Typer(
        help="A distilled student beside its teacher: what it costs, and what it saves.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options)
    asked = _asked(arguments)
    for name, command in commands.items():
        if name == asked:
            _mount(app, name, command)
        else:
            app.command(name, help=command.summary)(_not_asked)
    return app


def _asked(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _mount(app: typer.Typer, name: str, command: Command) -> None:
    module, attribute = command.target.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=name)
    else:
        app.command(name)(target)


def _not_asked() -> None:
    raise AssertionError("only the command that was asked for can run")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        try:
            typer.echo(f"tandem {version('tandem')}")
        except PackageNotFoundError:
            typer.echo(f"tandem, not installed: {install_command(CLIENT)}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main(
    arguments: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS
) -> None:
    """Run the command line and leave the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    write_what_can_be()
    words = with_text_behind_dashes(words)
    try:
        build_app(words, commands)(words, prog_name="tandem")
    except (UserError, TandemError) as error:
        print(f"tandem: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    except ModuleNotFoundError as error:
        name = (error.name or "tandem").partition(".")[0]
        if name in OWN_PACKAGES:
            raise
        asked = _asked(words) or ""
        needed = f"{asked} needs {name}, which is not installed"
        print(f"tandem: {needed}: {install_command(commands[asked].role)}", file=sys.stderr)
        sys.exit(1)


def with_text_behind_dashes(words: Sequence[str]) -> list[str]:
    """Have a last word that begins with a dash and holds a space be no option, but a prompt.

    >>> with_text_behind_dashes(["ask", "--raw", "-3 + 5 ="])
    ['ask', '--raw', '--', '-3 + 5 =']
    >>> with_text_behind_dashes(["ask", "How many?", "--reference", "-3 apples"])
    ['ask', 'How many?', '--reference', '-3 apples']
    """
    *before, last = words or [""]
    is_text = last.startswith("-") and " " in last.partition("=")[0]
    is_value = before[-1:] != ["--raw"] and any(word.startswith("--") for word in before[-1:])
    return [*before, "--", last] if is_text and not is_value and "--" not in words else list(words)


# What stands for characters that a terminal may not have.
_PLAIN = {
    "‖": "||", "×": "x", "·": "-", "–": "-", "−": "-", "…": "...", "≥": ">=", "≤": "<=",
    "→": "->", "±": "+-", "✓": "(right)", "✗": "(wrong)", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip


def write_what_can_be() -> None:
    """Have stdout and stderr write other characters where their encoding lacks some.

    ASCII for ours, Python's escapes for those of a model: \\xe9 for é.
    """
    codecs.register_error("tandem.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tandem.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    wanted = error.object[error.start : error.end]
    escaped = (each.encode("ascii", "backslashreplace").decode("ascii") for each in wanted)
    return "".join(map(_PLAIN.get, wanted, escaped)), error.end
