from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bundle.errors import BundleError
from export.pipeline import Pipeline
from export.publish.select import GateError
from export.run.errors import ExportError
from tests.support.export.cli import SETTINGS, run, stages_of, stub_package, write_rows_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_teacher: Path) -> Path:
    return write_rows_recipe(tmp_path, tiny_teacher)


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ExportError("the teacher failed"), 1),
        (GateError("no variant passed its gates: int8: kl 0.5 exceeds 0.02"), 3),
    ],
)
def test_expected_error_is_one_line_and_an_exit_code(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    code: int,
) -> None:
    assert stub_package(monkeypatch, error) == []
    assert run("run", recipe) == code
    assert capsys.readouterr().err == (f"tandem: {error}\n" if error else "")


def test_wrong_recipe_exits_with_2_and_names_the_key(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("teacher: x\noutput_dir: y\nprune: {num_texts: 0}\n")
    for command in ("run", "plan", "status", "sample"):
        assert run(command, recipe) == 2
        assert "prune.num_texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("run",),
        ("run", "no/such/recipe.yaml"),
        ("run", "."),
        ("plan", "."),
        ("sample",),
        ("status", "no/such/run"),
        ("resume", "no/such/run"),
        ("verify", "no/such/bundle"),
        ("compare", "."),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...]) -> None:
    assert run(*words) == 2


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for meaning in ("0 done", "3 a gate failed", "4 resume", "5 interrupted"):
        assert meaning in shown


@pytest.mark.nightly
def test_sigterm_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {**SETTINGS["sample"], "max_tokens": 200, "max_num_seqs": 2, "num_samples": 100}
    recipe = write_rows_recipe(tmp_path, tiny_teacher, sample=sample)
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", "export", "run", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        deadline_s = time.monotonic() + 200
        while not any(p.stat().st_size for p in (tmp_path / "run").rglob("completions.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 5
    assert errors == (
        "tandem: interrupted; everything finished is kept, "
        f"`tandem export resume {tmp_path / 'run'}` goes on from there\n"
    )
    assert run("status", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"sample +begun +[1-9]\d* of 1000 completions", shown)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_stage_is_gone_on_with_by_the_same_command(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def interrupt(pipeline: Pipeline, spec: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(Pipeline, "run", interrupt)
    assert run("sample", recipe) == 5
    assert f"`tandem export sample {recipe}` goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- a stage at a time


def test_stage_runs_what_it_needs_and_no_further(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", recipe) == 0
    assert stages_of(recipe) == ["sample"]
    assert run("prune", recipe) == 0
    assert stages_of(recipe) == ["accept", "prune", "sample"]
    capsys.readouterr()
    assert run("accept", recipe) == 0
    assert capsys.readouterr().out == "", "it was finished"
    assert run("status", recipe) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sample +finished +\S+ s .* completions 10", shown)
    assert re.search(r"prune +finished .* removed layers \[\d\]", shown)
    assert re.search(r"distill +to run", shown)


def test_cache_stage_needs_a_cache(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cache", recipe) == 2
    assert "cache.kind is 'none'" in capsys.readouterr().err


def test_recipe_that_cannot_work_is_refused_before_any_work(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_rows_recipe(
        tmp_path, tiny_teacher, prune={"num_removed_layers": 4, "num_texts": 2}
    )
    assert run("run", recipe) == 1
    assert "num_removed_layers 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- plan


def test_plan_prints_every_default_and_every_stage(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", recipe) == 0
    raw, _, table = capsys.readouterr().out.partition("\nteacher: ")
    printed = yaml.safe_load(raw)
    assert printed["distill"]["phases"][0]["learning_rate"] == 3e-4
    assert printed["sample"]["max_tokens"] == 8
    stages = [line.split()[0] for line in table.splitlines() if " to run " in line]
    assert stages == [
        "sample", "accept", "prune", "distill", "onnx-fp32", "onnx-int8", "onnx-int4", "evaluate",
        "package",
    ]  # fmt: skip
    assert "These are estimates" in table
    assert not (recipe.parent / "run").exists()


# --- bundles


def test_verify_exits_with_1_for_a_damaged_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", tmp_path) == 1
    expected = f"tandem: {tmp_path / 'manifest.json'} does not exist: {tmp_path} is not a bundle\n"
    assert capsys.readouterr().err == expected
    assert issubclass(BundleError, Exception)


def test_compare_exits_with_1_for_a_folder_that_is_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", tmp_path, tmp_path, "--force") == 1
    assert "is not a bundle" in capsys.readouterr().err
