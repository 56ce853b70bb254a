from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from bundle.errors import UsageError
from loadtest.config import RunConfig
from loadtest.flags import flag_of, parse_config, with_config_flags


def options() -> dict[str, Any]:
    """The flags of a command that has those of a run, by the setting."""
    app = typer.Typer()

    @app.command()
    @with_config_flags
    def run(as_json: bool = False, **flags: str | None) -> None: ...

    return {str(each.name): each for each in typer.main.get_command(app).params}


def test_every_setting_has_a_flag_without_its_unit() -> None:
    found = {name: option.opts[0] for name, option in options().items()}
    assert {name: flag_of(name) for name in RunConfig.model_fields}.items() <= found.items()
    wanted = "target arms dataset arrival rates duration warmup slo seed out block gap timeout"
    assert {f"--{word}" for word in wanted.split()} <= set(found.values())


@pytest.mark.parametrize(
    ("name", "metavar", "default"),
    [
        ("arms", "TEXT,…", "student,teacher"),
        ("rates_rps", "NUMBER,…", "1.0"),
        ("concurrency", "INTEGER,…", "4"),
        ("arrival", "poisson|constant|trace|closed", "poisson"),
        ("trace", "PATH", False),
        ("metrics_url", "TEXT", False),
        ("out", "PATH", False),
        ("seed", "INTEGER", "0"),
    ],
)
def test_help_says_what_a_flag_takes(name: str, metavar: str, default: str | bool) -> None:
    option = options()[name]
    assert (option.metavar, option.show_default) == (metavar, default)


def test_lists_are_joined_by_commas() -> None:
    flags = {"arms": "student, teacher", "rates_rps": "1,2.5", "out": "run", "pass_at_k": None}
    config = parse_config(flags)
    assert config == RunConfig(
        arms=("student", "teacher"), rates_rps=(1.0, 2.5), out=Path("run"), pass_at_k=()
    )


def test_settings_that_are_not_given_have_their_defaults() -> None:
    flags: dict[str, Any] = {**dict.fromkeys(RunConfig.model_fields), "out": "run"}
    assert parse_config(flags) == RunConfig(out=Path("run"))


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ({"rates_rps": "1,x"}, ["--out: ", "--rates: "]),
        ({"arrival": "burst", "out": "run"}, ["--arrival: "]),
        ({"seed": "-1", "duration_s": "0", "out": "run"}, ["--duration: ", "--seed: "]),
        ({"rates_rps": "2,2", "out": "run"}, ["loads are (2.0, 2.0)"]),
    ],
)
def test_all_wrong_settings_are_told_by_their_flags(
    flags: dict[str, str | None], lines: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(flags)
    told = str(caught.value).splitlines()
    assert len(told) == len(lines)
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True))
    assert caught.value.exit_code == 2


def test_wrong_setting_is_told_as_it_was_given() -> None:
    with pytest.raises(UsageError, match=r"--rates: .*number.*, got '1,x'"):
        parse_config({"rates_rps": "1,x", "out": "run"})
