from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import tandem
from bundle.errors import BundleError
from export import cli, pipeline
from export.cli import ConsoleReporter
from export.config import ExportConfig, ExportError
from export.report import GateError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: some/model\noutput_dir: runs/x\n")
    return path


def run(*words: object) -> int:
    """Run `tandem export` and return its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        tandem.main(["export", *map(str, words)])
    return int(exit_info.value.code or 0)


def fail_with(error: Exception) -> Any:
    def run_export(config: ExportConfig, reporter: object) -> Path:
        raise error

    return run_export


# --- exit codes


def test_finished_run_exits_with_0(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[ExportConfig] = []
    monkeypatch.setattr(pipeline, "run_export", lambda config, reporter: configs.append(config))
    assert run("run", recipe) == 0
    assert [config.teacher for config in configs] == ["some/model"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GateError("no variant passed its gates: int8: kl 0.5 exceeds 0.02"), 3),
        (ExportError("the teacher failed"), 1),
    ],
)
def test_expected_error_is_one_line_and_an_exit_code(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    monkeypatch.setattr(pipeline, "run_export", fail_with(error))
    assert run("run", recipe) == code
    assert capsys.readouterr().err == f"tandem: {error}\n"


def test_wrong_recipe_exits_with_1_and_names_the_key(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("teacher: x\noutput_dir: y\ndistill: {alpha: 2}\n")
    assert run("run", recipe) == 1
    assert "distill.alpha" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("run",),
        ("run", "no/such/recipe.yaml"),
        ("run", "."),
        ("verify",),
        ("verify", "no/such/bundle"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...]) -> None:
    assert run(*words) == 2


# --- verify


def test_verify_counts_the_files_of_an_intact_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Manifest:
        files = ("a", "b", "c")

    monkeypatch.setattr(cli, "verify_bundle", lambda bundle: Manifest)
    assert run("verify", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 3 files are what the manifest says\n"


def test_verify_exits_with_1_for_a_damaged_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", tmp_path) == 1
    expected = f"tandem: {tmp_path / 'manifest.json'} does not exist: {tmp_path} is not a bundle\n"
    assert capsys.readouterr().err == expected
    assert issubclass(BundleError, Exception)


# --- progress


def test_message_carries_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter().say("sample …")
    assert capsys.readouterr().out == "[    0 s] sample …\n"


def test_progress_in_a_log_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 4.0, 11.0, 11.0, 11.0, 12.0, 13.0, 13.0, 13.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    show = ConsoleReporter().track("training steps")
    for done in (1, 2, 3, 4):
        show(done, 4)
    assert capsys.readouterr().out.splitlines() == [
        "[   11 s]   training steps: 2 of 4",
        "[   13 s]   training steps: 4 of 4",
    ]


def test_progress_on_a_terminal_is_a_bar_that_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show = ConsoleReporter().track("training steps")
    for done in (1, 2):
        show(done, 2)
    shown = capsys.readouterr().out
    assert "training steps" in shown
    assert "2/2" in shown
