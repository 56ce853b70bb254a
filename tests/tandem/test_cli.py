from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import typer

import tandem.cli
from bundle.errors import UserError
from serve.errors import QueueFullError
from tandem.cli import COMMANDS, Command


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    """Commands of a module that is made up here, and one whose module does not exist."""
    module = ModuleType("made_up")
    group = typer.Typer(help="A group.", no_args_is_help=True)

    @group.command()
    def verify(bundle: str) -> None:
        """Verify a bundle."""
        print(f"verified {bundle}")

    @group.command()
    def gate() -> None:
        raise typer.Exit(3)

    def greet(name: str, loud: bool = False) -> None:
        """Greet someone."""
        print(f"HELLO {name}" if loud else f"hello {name}")

    def fail() -> None:
        raise UserError("x.json is missing: export it again")

    def refuse() -> None:
        raise QueueFullError("the queue is full", retry_after_s=1.0)

    def crash() -> None:
        raise RuntimeError("a bug")

    for name, value in {**locals(), "group": group}.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "made_up", module)
    names = ("group", "greet", "fail", "refuse", "crash")
    return {name: Command(f"made_up:{name}", f"Does {name}.") for name in names} | {
        "broken": Command("no_such_module:main", "Cannot be imported.")
    }


def run(words: list[str], commands: dict[str, Command]) -> int:
    with pytest.raises(SystemExit) as exit_info:
        tandem.cli.main(words, commands)
    return int(exit_info.value.code or 0)


def test_function_becomes_a_command(
    commands: dict[str, Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["greet", "Ada", "--loud"], commands) == 0
    assert capsys.readouterr().out == "HELLO Ada\n"


def test_app_becomes_a_group_of_commands(
    commands: dict[str, Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "verify", "runs/demo"], commands) == 0
    assert capsys.readouterr().out == "verified runs/demo\n"


def test_exit_code_of_a_command_is_the_process_exit_code(commands: dict[str, Command]) -> None:
    assert run(["group", "gate"], commands) == 3


def test_help_names_every_command_and_imports_none(
    commands: dict[str, Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--help"], commands) == 0
    shown = capsys.readouterr().out
    assert all(f"Does {name}." in shown for name in ("group", "greet"))
    assert "Cannot be imported." in shown


def test_command_shows_its_own_help(
    commands: dict[str, Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "--help"], commands) == 0
    assert "Verify a bundle." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("fail", "tandem: x.json is missing: export it again\n"),
        ("refuse", "tandem: the queue is full\n"),
    ],
)
def test_expected_error_is_one_line(
    commands: dict[str, Command], capsys: pytest.CaptureFixture[str], command: str, line: str
) -> None:
    assert run([command], commands) == 1
    assert capsys.readouterr().err == line


def test_bug_keeps_its_traceback(commands: dict[str, Command]) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        tandem.cli.main(["crash"], commands)


@pytest.mark.parametrize("words", [["nope"], ["greet"], ["greet", "Ada", "--wrong"]])
def test_wrong_usage_exits_with_2(commands: dict[str, Command], words: list[str]) -> None:
    assert run(words, commands) == 2


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], dict(COMMANDS)) == 0
    assert capsys.readouterr().out.startswith("tandem")


def test_command_that_was_not_asked_for_cannot_run(commands: dict[str, Command]) -> None:
    app = tandem.cli.build_app(["group"], commands)
    with pytest.raises(AssertionError, match="only the command that was asked for"):
        app(["greet"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"], dict(COMMANDS)) == 0
    assert f"tandem {name}" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, tandem.cli; tandem.cli.build_app(['--help']);"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'grpc', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def parameters_of(name: str) -> Iterator[tuple[Any, str]]:
    """Yield every parameter of a command and its subcommands, with the help that it shows."""
    left = [typer.main.get_command(tandem.cli.build_app([name])).commands[name]]  # type: ignore[attr-defined]
    while left:
        command = left.pop()
        left += getattr(command, "commands", {}).values()
        for each in command.params:
            yield each, (each.get_help_record(typer.Context(command)) or ("", ""))[1]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_flag_is_a_sentence_with_its_default(name: str) -> None:
    for each, shown in parameters_of(name):
        assert (each.help or "").endswith("."), f"{each.opts}: {each.help}"
        is_without = each.required or each.nargs < 0 or getattr(each, "is_flag", False)
        assert is_without or "default" in shown, f"{each.opts}: {shown}"


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
@pytest.mark.parametrize("module", ["tandem.cli", "serve.models.onnx_session", "export.graph.int8"])
def test_onnxruntime_sends_no_usage_data_unless_it_is_told_to(
    module: str, given: str | None, expected: str
) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environ["ORT_DISABLE_TELEMETRY"] = given
    code = f"import {module}, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
