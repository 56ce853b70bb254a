"""`tandem loadtest run` against a real server over fake models: its folder, from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loadtest.analysis.summary import read_summary
from loadtest.client.requests_file import read_requests
from loadtest.ledger.journal import read_journal
from loadtest.ledger.ledger import check

ROOT = Path(__file__).parents[2]


def loadtest(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem", "loadtest", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run(serving: Any, make_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run's folder, what it printed, and the server's counts behind it."""
    folder = tmp_path_factory.mktemp("loadtest") / "run"
    with serving(make_pair(max_model_len=512)) as live:
        done = loadtest(
            "run", "--target", live.server.address, "--metrics-url", live.server.metrics_url,
            "--out", str(folder), "--rates", "6,12", "--duration", "1.5", "--warmup", "0.5",
            "--block", "0.5", "--gap", "0.1", "--num-samples", "2", "--max-tokens", "8",
            "--divergence", "exact", "--slo", "ttft_p95=5", "--seed", "3", "--json",
            "--processes", "2", "--journal", str(folder.parent / "journal"),
        )  # fmt: skip
        labels = {"rpc": "Generate", "code": "OK", "task": "other"}
        counts = {
            arm: live.pair.value("requests_total", route=arm, **labels)
            for arm in ("student", "teacher")
        }
    # A slow machine makes a run INVALID (3), and it has all its artifacts none the less.
    assert done.returncode in (0, 3), done.stderr
    return folder, done, counts


def test_folder_has_every_artifact(run: Any) -> None:
    folder, done, _ = run
    names = {"run.json", "requests.jsonl", "summary.json", "summary.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads(done.stdout.splitlines()[-1])["out"] == str(folder)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "<script" not in page and not re.search(r"(src|href)=.https?:", page)


def test_journal_has_every_request_and_balances(run: Any) -> None:
    folder = run[0].parent / "journal"
    ledger = check(read_journal([folder]))
    assert ledger.violations == [] and len(list(folder.iterdir())) == 2
    assert ledger.codes == {"OK": len(read_requests(run[0] / "requests.jsonl"))}


def test_client_and_server_saw_the_same_requests(run: Any) -> None:
    folder, _, counts = run
    records = read_requests(folder / "requests.jsonl")
    assert Counter(record.plan.arm for record in records) == counts
    assert all(record.is_ok for record in records)
    cross_check = read_summary(folder).cross_check
    assert cross_check is not None
    assert all(check["agrees"] for check in cross_check["counts"])


def test_both_arms_were_sent_the_same_prompts_and_seeds(run: Any) -> None:
    records = read_requests(run[0] / "requests.jsonl")
    sent = {
        arm: sorted(
            (r.plan.pair, r.plan.prompt_id, r.plan.seed) for r in records if r.plan.arm == arm
        )
        for arm in ("student", "teacher")
    }
    assert sent["student"] == sent["teacher"] != []


def test_summary_has_quality_and_latency_of_every_cell(run: Any) -> None:
    summary = read_summary(run[0])
    assert [(cell.arm, cell.load) for cell in summary.cells] == [
        ("student", 6.0), ("teacher", 6.0), ("student", 12.0), ("teacher", 12.0)
    ]  # fmt: skip
    for cell in summary.cells:
        assert cell.quality is not None and cell.quality.exact_kl is not None
        assert cell.quality.exact_kl.value > 0 and set(cell.quality.pass_at_k) == {1, 2}
        assert cell.ttft.count == cell.num_offered > 0
    assert {comparison.load for comparison in summary.comparisons} == {6.0, 12.0}


def test_same_seed_plans_the_same_and_another_does_not(run: Any) -> None:
    config = json.loads((run[0] / "run.json").read_text())
    words = ["plan", "--rates", "6,12", "--duration", "1.5", "--warmup", "0.5", "--block", "0.5",
             "--gap", "0.1", "--num-samples", "2", "--max-tokens", "8", "--json"]  # fmt: skip
    again, other = (
        json.loads(loadtest(*words, "--seed", seed).stdout.splitlines()[-1]) for seed in ("3", "4")
    )
    assert again["schedule_sha256"] == config["schedule_sha256"] != other["schedule_sha256"]
