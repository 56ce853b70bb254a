"""What the README and docs/serve.md show can be done as shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from tandem.cli import build_app

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "docs/serve.md", "docs/export.md", "docs/loadtest.md", "SECURITY.md")
ADDRESS = "127.0.0.1:50051"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the `tandem ...` lines of all pages, their comments and redirections left out."""
    shown = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    lines = shown.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("tandem ")]


def words_of(line: str) -> list[str]:
    words = shlex.split(line.partition("#")[0])
    return words[1 : words.index(">") if ">" in words else None]


@pytest.mark.parametrize("line", commands())
def test_command_is_understood(line: str) -> None:
    words = words_of(line)
    command: Any = typer.main.get_command(build_app(words))
    while isinstance(command, TyperGroup):
        context = command.make_context(command.name, list(words), allow_interspersed_args=False)
        _, command, words = command.resolve_command(context, words)
        assert command is not None
    try:
        command.make_context(command.name, list(words))
    except typer.BadParameter as error:
        # Everything was understood; that folder is of a run that has not been made here.
        assert "does not exist" in error.message


def test_python_of_the_readme_runs(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, live.server.address), "README.md", "exec"), {})
    roles = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "ROLE_" in line]
    assert roles == ["ROLE_STUDENT", "ROLE_TEACHER"]
