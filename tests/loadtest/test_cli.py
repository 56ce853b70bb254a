from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import loadtest
import tandem.cli
from estimators.estimate import Estimate
from loadtest.analysis.summary import Cell, Distribution, Summary, Validity, to_json
from loadtest.client.requests_file import REQUESTS_FILE, write_requests
from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.progress import ProgressReporter
from loadtest.verdicts.find_max import MaxRate

Main = Callable[..., tuple[int, str, str]]
VALID = Validity(True, (), None, None)
SLOW = Validity(False, ("send lag p99 is 9 ms, limit 1 ms", "CPU 0.9, limit 0.8"), 0.009, 0.9)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Run `tandem loadtest`; returns its exit code, what it printed and what it complained of."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            tandem.cli.main(["loadtest", *map(str, words)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


class Pipeline:
    """Stands for `loadtest.run`: keeps what it was told, and writes a run without requests."""

    def __init__(self) -> None:
        self.config: RunConfig | None = None
        self.credentials: Credentials | None = None
        self.validity = VALID
        self.statuses = {"OK": 40}
        self.rate = MaxRate(4.0, 4.5, ())

    def run(
        self,
        config: RunConfig,
        credentials: Credentials,
        reporter: ProgressReporter,
        may_overwrite: bool,
    ) -> Path:
        self.config, self.credentials = config, credentials
        write_run(config.out, self.validity, statuses=self.statuses, asked=config)
        (config.out / "summary.md").write_text("# what came of it\n")
        return config.out

    def find_max(
        self,
        config: RunConfig,
        credentials: Credentials,
        reporter: ProgressReporter,
        may_overwrite: bool,
    ) -> dict[str, MaxRate]:
        self.config, self.credentials = config, credentials
        config.out.mkdir()
        (config.out / "find_max.json").write_text('{"arms": {}}')
        return {"student": self.rate}


def write_run(
    folder: Path, validity: Validity = VALID, ttft_p95: float = 0.2, seed: int = 3,
    *, statuses: dict[str, int] | None = None, asked: RunConfig | None = None,
) -> Path:  # fmt: skip
    """Write a run of 40 requests at one load, as summary.json has it."""
    p95 = Estimate(ttft_p95, None, None, 40)
    nothing = Distribution(0, None, None, None, None, None)
    cell = Cell(
        "student", 1.0, 40, statuses or {"OK": 40}, Distribution(40, 0.1, None, None, p95, None),
        nothing, nothing, nothing, None, 1.0, 10.0, None, None,
    )  # fmt: skip
    asked = asked or RunConfig(out=folder, seed=seed, max_tokens=seed)
    config = asked.model_dump(mode="json")
    summary = Summary(config, f"{seed:064}", {}, (), validity, 0, (cell,), ())
    folder.mkdir()
    (folder / "summary.json").write_text(to_json(summary))
    write_requests(folder / REQUESTS_FILE, [])
    return folder


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = Pipeline()
    module = SimpleNamespace(run=made.run, find_max=made.find_max)
    monkeypatch.setitem(sys.modules, "loadtest.run", module)
    monkeypatch.setattr(loadtest, "run", module, raising=False)
    return made


# run


def test_run_is_told_what_the_flags_say(main: Main, pipeline: Pipeline, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    out = tmp_path / "run"
    code, printed, complaint = main(
        *("run", "--out", out, "--target", "server:1", "--arms", "student", "--rates", "1,2.5"),
        *("--duration", "7", "--warmup", "0", "--seed", "3", "--token-file", token),
    )
    assert (code, complaint) == (0, "")
    assert pipeline.config == RunConfig(
        out=out,
        target="server:1",
        arms=("student",),
        rates_rps=(1.0, 2.5),
        duration_s=7.0,
        warmup_s=0.0,
        seed=3,
    )
    assert pipeline.credentials == Credentials("secret", None)
    assert printed == f"# what came of it\n\n{out / 'report.html'}\n"


def test_last_line_of_a_run_is_json(main: Main, pipeline: Pipeline, tmp_path: Path) -> None:
    code, printed, _ = main("run", "--out", tmp_path / "run", "--json", "--seed", "3")
    found = json.loads(printed.splitlines()[-1])
    assert code == 0
    assert found["out"] == str(tmp_path / "run")
    assert found["summary"]["config"]["seed"] == 3


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_invalid_run_exits_with_3_and_says_why(
    main: Main, pipeline: Pipeline, tmp_path: Path, flags: list[str]
) -> None:
    pipeline.validity = SLOW
    code, printed, complaint = main("run", "--out", tmp_path / "run", *flags)
    assert code == 3
    assert printed
    assert complaint == (
        f"tandem: {tmp_path / 'run'} is INVALID: send lag p99 is 9 ms, limit 1 ms; "
        "CPU 0.9, limit 0.8\n"
    )


@pytest.mark.parametrize(
    ("rate", "line"),
    [
        ((4.0, 4.5), "student: meets the SLO at 4 requests per second, not for sure at 4.5\n"),
        ((None, 0.01), "student: does not meet the SLO, not even at 0.01 requests per second\n"),
        ((64.0, None), "student: meets the SLO at 64 requests per second, the most tried\n"),
    ],
)
def test_highest_rate_is_one_line_per_arm(
    main: Main, pipeline: Pipeline, tmp_path: Path, rate: tuple[Any, Any], line: str
) -> None:
    pipeline.rate = MaxRate(*rate, ())
    found = main("run", "--out", tmp_path / "run", "--find-max", "--slo", "ttft_p95=0.2")
    assert found == (0, line, "")


def test_highest_rate_as_json(main: Main, pipeline: Pipeline, tmp_path: Path) -> None:
    flags = ("--find-max", "--slo", "ttft_p95=0.2", "--arrival", "constant", "--json")
    assert main("run", "--out", tmp_path / "run", *flags)[:2] == (0, '{"arms": {}}\n')


@pytest.mark.parametrize("flags", [[], ["--slo", "ttft_p95=0.2", "--arrival", "closed"]])
def test_highest_rate_needs_an_objective_and_an_open_loop(
    main: Main, tmp_path: Path, flags: list[str]
) -> None:
    code, _, complaint = main("run", "--out", tmp_path / "run", "--find-max", *flags)
    assert code == 2
    assert "--find-max needs --slo, and --arrival poisson or constant" in complaint


def test_run_without_a_folder_is_wrong_usage(main: Main) -> None:
    code, shown, told = main("run")
    assert (code, shown) == (2, "") and told.startswith("tandem: --out: is required: The folder")


# plan


def test_plan_shows_what_would_be_sent(main: Main) -> None:
    flags = ("--arrival", "constant", "--rates", "2", "--duration", "10", "--warmup", "5")
    code, printed, complaint = main("plan", *flags)
    first, second = printed.splitlines()
    assert (code, complaint) == (0, "")
    assert first == "60 requests in 6 blocks, 35 s; 2 requests per second for student, teacher"
    assert main("plan", *flags)[1].splitlines()[1] == second
    assert main("plan", *flags, "--seed", "1")[1].splitlines()[1] != second


def test_plan_as_json(main: Main) -> None:
    flags = ("--arrival", "constant", "--rates", "2,1", "--duration", "10", "--warmup", "0")
    code, printed, _ = main("plan", *flags, "--json")
    found = json.loads(printed)
    assert code == 0
    assert len(found.pop("schedule_sha256")) == 64
    assert found == {"num_requests": 60, "num_blocks": 8, "loads": [1, 2], "duration_s": 47}


def test_plan_of_a_closed_loop_cannot_say_how_many_requests(main: Main) -> None:
    flags = ("--arrival", "closed", "--concurrency", "1,2", "--duration", "1")
    assert json.loads(main("plan", *flags, "--json")[1])["num_requests"] is None
    assert main("plan", *flags)[1].startswith("closed loop in ")
    assert "concurrency 1, 2" in main("plan", *flags)[1]


def test_plan_of_a_missing_dataset_exits_with_1(main: Main, tmp_path: Path) -> None:
    code, _, complaint = main("plan", "--dataset", tmp_path / "missing.jsonl")
    assert code == 1
    assert "is no file" in complaint


# report, compare


def test_report_of_a_folder_that_is_no_run_exits_with_1(main: Main, tmp_path: Path) -> None:
    code, _, complaint = main("report", tmp_path)
    assert code == 1
    assert "summary.json" in complaint


def test_summary_of_a_run_that_died_is_asked_for_in_vain(main: Main, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    code, _, complaint = main("gate", tmp_path, "--max", "student.ttft_p95=0.2")
    assert code == 1
    assert f"if the run died, `tandem loadtest report {tmp_path}` sums it up" in complaint


@pytest.mark.parametrize("validity", [VALID, SLOW])
def test_run_with_failures_exits_with_4_and_says_how_many(
    main: Main, pipeline: Pipeline, tmp_path: Path, validity: Validity
) -> None:
    pipeline.validity, pipeline.statuses = validity, {"OK": 37, "UNAVAILABLE": 3}
    code, _, complaint = main("run", "--out", tmp_path / "run")
    assert code == 4
    assert complaint == (
        f"tandem: {tmp_path / 'run'}: 3 of 40 requests failed: 3 errors; "
        "--max-failure-rate 0 allows fewer\n"
    )


def test_run_may_be_told_how_many_failures_are_allowed(
    main: Main, pipeline: Pipeline, tmp_path: Path
) -> None:
    pipeline.statuses = {"OK": 37, "UNAVAILABLE": 3}
    assert main("run", "--out", tmp_path / "run", "--max-failure-rate", "0.075")[0] == 0
    assert main("run", "--out", tmp_path / "other", "--max-failure-rate", "0.07")[0] == 4


def test_report_is_written_anew(main: Main, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("{}")
    assert main("report", run) == (0, f"{run / 'report.html'}\n", "")
    assert "</html>" in (run / "report.html").read_text()


def test_run_that_died_without_a_request_is_summed_up(main: Main, tmp_path: Path) -> None:
    config = RunConfig(out=tmp_path).model_dump(mode="json")
    run = {"config": config, "schedule_sha256": "5e", "versions": {}, "models": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    code, printed, _ = main("report", tmp_path)
    assert code == 0
    assert "it died before its end" in printed and "no request was measured" in printed
    assert main("gate", tmp_path, "--max", "student.ttft_p95=1")[0] == 3


def test_report_of_a_broken_run_is_an_error(main: Main, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    code, _, complaint = main("report", tmp_path)
    assert (code, complaint) == (
        1, f"tandem: {tmp_path / 'run.json'} is not what a run writes: no 'config'\n",
    )  # fmt: skip


def test_two_runs_are_compared(main: Main, tmp_path: Path) -> None:
    before = write_run(tmp_path / "before")
    after = write_run(tmp_path / "after", ttft_p95=0.25)
    code, printed, complaint = main("compare", before, after)
    assert (code, complaint) == (0, "")
    row = next(line for line in printed.splitlines() if "ttft_p95" in line)
    assert row.endswith("25.0% worse |")
    code, printed, _ = main("compare", before, after, "--json")
    changes = json.loads(printed.splitlines()[-1])["changes"]
    assert [each["worse_share"] for each in changes if each["metric"] == "ttft_p95"] == [0.25]


def test_runs_of_different_settings_are_compared_by_force_only(main: Main, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    code, _, complaint = main("compare", *runs)
    assert code == 1
    assert "max_tokens is 1 and 2" in complaint
    assert main("compare", *runs, "--force")[0] == 0


# gate


def test_run_that_keeps_its_limits_passes(main: Main, tmp_path: Path) -> None:
    before = write_run(tmp_path / "before", ttft_p95=0.19)
    run = write_run(tmp_path / "run")
    code, printed, complaint = main(
        *("gate", run, "--max", "student.ttft_p95=0.2", "--min", "student@1.ttft_p95=0.2"),
        *("--max-regress", "student.ttft_p95=0.1", "--baseline", before),
    )
    assert (code, complaint) == (0, "")
    assert printed == f"gate passed: {run} keeps all 3 limits\n"


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (("--max", "student.ttft_p95=0.1"), "--max student.ttft_p95=0.1: 0.2 is more at load 1"),
        (("--min", "student.ttft_p95=0.3"), "--min student.ttft_p95=0.3: 0.2 is less at load 1"),
        (("--max-regress", "student.ttft_p95=0.1"), "0.2 after 0.1 is 100.0% worse at load 1"),
    ],
)
def test_broken_limit_exits_with_3_and_one_line(
    main: Main, tmp_path: Path, limit: tuple[str, str], reason: str
) -> None:
    before = write_run(tmp_path / "before", ttft_p95=0.1)
    run = write_run(tmp_path / "run")
    words = ("gate", run, *limit, "--max", "student.ttft_p95=1", "--baseline", before)
    code, printed, complaint = main(*words)
    assert (code, printed) == (3, "")
    assert complaint.startswith(f"tandem: gate failed: {run}: {limit[0]} student.ttft_p95=")
    assert complaint.endswith(f"{reason}\n")
    assert complaint.count("\n") == 1
    found = json.loads(main(*words, "--json")[1])
    assert not found["is_open"]
    assert [each.endswith(reason) for each in found["broken"]] == [True]


def test_invalid_run_breaks_every_gate(main: Main, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SLOW)
    code, _, complaint = main("gate", run, "--max", "student.ttft_p95=1")
    assert code == 3
    assert "the run is INVALID: send lag p99 is 9 ms" in complaint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a gate needs a limit"),
        (["--max", "student.ttft_p95"], "write ARM.METRIC=NUMBER"),
        (["--max", "nobody.ttft_p95=1"], "no arm 'nobody'"),
    ],
)
def test_gate_without_a_sound_limit_is_wrong_usage(
    main: Main, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, complaint = main("gate", write_run(tmp_path / "run"), *words)
    assert code == 2
    assert message in complaint


# help


def test_help_is_instant_since_it_loads_no_library_of_a_command() -> None:
    code = (
        "import sys, loadtest.cli;"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'grpc', 'numpy', 'jinja2', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
