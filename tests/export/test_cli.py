from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem.cli
from bundle.errors import BundleError
from export import cli
from export.cli import ConsoleReporter
from export.pipeline import Pipeline
from export.publish.select import GateError
from export.run.errors import ExportError

SETTINGS: dict[str, Any] = {
    "tasks": {"max_train": 8, "max_test": 2},
    "sample": {"max_tokens": 8, "max_num_seqs": 16, "max_model_len": 256},
    "accept": {"require_correct": False, "drop_truncated": False, "max_repetition": 1.0},
    "prune": {"num_removed_layers": 1, "num_texts": 2},
}


def write_recipe(folder: Path, teacher: Path, **changes: Any) -> Path:
    jsonl = folder / "tasks.jsonl"
    if not jsonl.exists():
        rows = [{"prompt": f"Say {n}."} for n in range(40)]
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {**SETTINGS["tasks"], "sources": [{"kind": "jsonl", "path": str(jsonl)}]}
    paths = {"teacher": teacher, "output_dir": folder / "run", "cache_dir": folder / "cache"}
    settings = SETTINGS | {"tasks": tasks} | {key: str(path) for key, path in paths.items()}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings | changes))
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_teacher: Path) -> Path:
    return write_recipe(tmp_path, tiny_teacher)


def run(*words: object) -> int:
    """Run `tandem export` and return its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        tandem.cli.main(["export", *map(str, words)])
    return int(exit_info.value.code or 0)


def stages_of(recipe: Path) -> list[str]:
    """Return the names of the stages that are there, finished or not."""
    work = recipe.parent / "run" / "work"
    return sorted(path.name.partition("-")[0] for path in work.glob("*"))


def stub_package(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Path]:
    """Let the last step fail, or do nothing: a whole run takes 10 s. Returns where it got to."""
    packaged: list[Path] = []

    def package(pipeline: Pipeline) -> None:
        packaged.append(pipeline.config.output_dir)
        if error is not None:
            raise error

    monkeypatch.setattr(Pipeline, "package", package)
    return packaged


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


def test_sigterm_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {**SETTINGS["sample"], "max_tokens": 200, "max_num_seqs": 2, "num_samples": 100}
    recipe = write_recipe(tmp_path, tiny_teacher, sample=sample)
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


def test_interrupted_stage_is_gone_on_with_by_the_same_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(pipeline: Pipeline, spec: object) -> None:
        signal.raise_signal(signal.SIGINT)

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
    recipe = write_recipe(tmp_path, tiny_teacher, prune={"num_removed_layers": 4, "num_texts": 2})
    assert run("run", recipe) == 1
    assert "num_removed_layers 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- resume


@pytest.fixture
def begun(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[Path]]:
    """A recipe whose run began, with a teacher of its own, and where runs got packaged."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    recipe = write_recipe(tmp_path, teacher)
    packaged = stub_package(monkeypatch)
    assert run("run", recipe) == 0
    return recipe, packaged


def test_resume_goes_on_with_the_recorded_run(
    begun: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, packaged = begun
    monkeypatch.chdir(recipe.parent)
    assert run("resume", "run") == 0
    assert packaged == [recipe.parent / "run"] * 2


@pytest.mark.parametrize("what", ["recipe", "JSONL source", "teacher"])
def test_resume_refuses_another_input_and_names_both_hashes(
    begun: tuple[Path, list[Path]],
    capsys: pytest.CaptureFixture[str],
    make_model: Any,
    what: str,
) -> None:
    recipe, packaged = begun
    folder = recipe.parent
    if what == "teacher":
        make_model(seed=1).save_pretrained(folder / "teacher")
        changed = folder / "teacher"
    else:
        changed = recipe if what == "recipe" else folder / "tasks.jsonl"
        changed.write_text(changed.read_text() + "\n")
    assert run("resume", folder / "run") == 4
    shown = capsys.readouterr().err
    digits = "[0-9a-f]{12}"
    assert re.search(
        rf"the {what} {changed} had sha256 {digits} when .*, now it has sha256 {digits}:", shown
    )
    assert f"`tandem export run {recipe}`" in shown
    assert len(packaged) == 1


def set_rope_theta(teacher: Path) -> None:
    raw = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("chat_template.jinja", lambda teacher: (teacher / "chat_template.jinja").write_text("x")),
        ("config.json", set_rope_theta),
    ],
)
def test_file_of_the_teacher_edited_between_two_runs_is_told_by_every_command(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], name: str, edit: Any
) -> None:
    recipe, packaged = begun
    teacher, output_dir = recipe.parent / "teacher", recipe.parent / "run"
    assert run("sample", recipe) == 0
    edit(teacher)
    told = f"{name} of the teacher {teacher} had sha256 "
    capsys.readouterr()
    assert run("resume", output_dir) == 4
    assert told in capsys.readouterr().err
    assert run("status", output_dir) == 0
    assert f"changed: {told}" in capsys.readouterr().out
    assert run("status", recipe) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sample +to run", shown) and f"changed: {told}" in shown
    assert run("sample", recipe) == 0
    assert f"changed: {told}" in capsys.readouterr().out
    assert stages_of(recipe) == ["sample", "sample"], "that of the old file was not taken"
    assert run("resume", output_dir) == 0
    assert len(packaged) == 2


def test_status_says_nothing_of_inputs_that_are_as_they_were(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = begun
    (recipe.parent / "teacher" / "README.md").write_text("A teacher.")
    for path in (recipe, recipe.parent / "run"):
        assert run("status", path) == 0
        assert "changed" not in capsys.readouterr().out


def test_status_names_weights_that_changed_and_a_teacher_that_is_gone(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], make_model: Any
) -> None:
    recipe, _ = begun
    teacher = recipe.parent / "teacher"
    make_model(seed=1).save_pretrained(teacher)
    assert run("status", recipe.parent / "run") == 0
    assert f"changed: the teacher {teacher} had sha256" in capsys.readouterr().out
    shutil.rmtree(teacher)
    assert run("status", recipe.parent / "run") == 0
    assert "now it is gone" in capsys.readouterr().out


def test_resume_refuses_a_recipe_that_is_gone(
    begun: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = begun
    recipe.unlink()
    assert run("resume", recipe.parent / "run") == 4
    assert "now it is gone" in capsys.readouterr().err


def test_run_starts_a_changed_recipe_that_resume_then_goes_on_with(
    begun: tuple[Path, list[Path]],
) -> None:
    recipe, packaged = begun
    recipe.write_text(recipe.read_text() + "gates: {student_kl: 9}\n")
    assert run("run", recipe) == run("resume", recipe.parent / "run") == 0
    assert len(packaged) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no run began there"), ("{}", "is damaged or of another version")],
)
def test_folder_without_a_run_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    for command in ("resume", "status"):
        assert run(command, tmp_path) == 1
        shown = capsys.readouterr().err
        assert message in shown
        assert "tandem export run RECIPE" in shown


def test_missing_jsonl_source_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "tasks.jsonl").unlink()
    assert run("run", recipe) == 1
    assert "tasks.jsonl cannot be read: No such file" in capsys.readouterr().err


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


# --- progress


def test_message_carries_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter().say("sample …")
    assert capsys.readouterr().out == "[    0 s] sample …\n"


def test_processes_that_only_help_print_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reporter = ConsoleReporter(is_quiet=True)
    reporter.say("sample …")
    reporter.track("training steps")(2, 2)
    assert capsys.readouterr().out == ""


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


def test_bar_of_an_interrupted_run_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reporter = ConsoleReporter()
    reporter.track("training steps")(1, 2)
    (bar,) = reporter._bars
    assert bar.live.is_started
    reporter.close()
    assert not bar.live.is_started
