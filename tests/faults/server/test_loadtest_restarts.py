"""Load tests whose server is killed or begins anew in the middle, or that are killed themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tandem.cli
from loadtest.analysis.summary import read_summary
from loadtest.client.requests_file import part_files, read_parts, read_requests
from loadtest.records import RequestRecord
from loadtest.server_metrics import ServerWatch
from tests.support.polling import wait_until
from tests.support.processes import free_port, running
from tests.support.tiny_bundle import tiny_student

ROOT = Path(__file__).parents[3]
PATIENCE_S = 300.0
LOAD = (
    "--arms", "student", "--dataset", "synthetic:3x8", "--arrival", "constant", "--rates", "20",
    "--duration", "10", "--warmup", "0", "--block", "0.5", "--gap", "0.05", "--seed", "3",
)  # fmt: skip
NUM_PLANNED = 200


class Scene:
    """A server that is to come and go, and the folder of a load test on it."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run"
        self.metrics_port = free_port()
        self.server = tiny_student("server", folder, "--metrics-port", str(self.metrics_port))

    @property
    def words(self) -> list[str]:
        metrics_url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        given = ("--target", self.server.address, "--metrics-url", metrics_url)
        return ["loadtest", "run", *given, "--out", str(self.out), *LOAD]

    def wait_for_records(self, number: int) -> None:
        """Return when so many are on disk, while the run goes on."""
        self.wait_for(lambda records: len(records) >= number)

    def wait_for(self, is_so: Callable[[list[RequestRecord]], bool]) -> None:
        """Return when this holds of the records on disk."""
        wait_until(lambda: is_so(read_parts(part_files(self.out))), PATIENCE_S)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    with running(scene.server):
        yield scene


def run(scene: Scene, meanwhile: Callable[[], None], *words: str) -> int:
    """Run the load test, and something beside it; returns its exit code."""
    beside = threading.Thread(target=meanwhile)
    beside.start()
    with pytest.raises(SystemExit) as caught:
        tandem.cli.main([*scene.words, *words])
    beside.join()
    return int(caught.value.code or 0)


def test_server_that_is_killed_costs_no_record(scene: Scene, capsys: Any) -> None:
    def kill() -> None:
        scene.wait_for_records(10)
        scene.server.kill()

    code = run(scene, kill, "--divergence", "none")
    complaint = capsys.readouterr().err
    summary = read_summary(scene.out)
    statuses = Counter(record.status for record in read_requests(scene.out / "requests.jsonl"))
    assert code == 4
    assert statuses.total() == NUM_PLANNED and statuses["OK"] >= 10
    assert summary.num_failed == NUM_PLANNED - statuses["OK"] > 0
    assert f"{summary.num_failed} of {NUM_PLANNED} requests failed" in complaint.splitlines()[-1]
    assert "the server's metrics were gone behind the load" in complaint.splitlines()[-1]
    assert summary.cross_check is None
    assert "metrics were gone" in (scene.out / "summary.md").read_text()
    assert "etrics were gone" in (scene.out / "report.html").read_text()
    assert not part_files(scene.out)


def test_server_that_begins_anew_costs_the_cross_check_alone(
    scene: Scene, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back, stop = threading.Event(), ServerWatch.stop

    def restart() -> None:
        scene.wait_for_records(10)
        scene.server.kill()
        scene.server.start()
        scene.server.wait_ready()
        is_back.set()

    def stop_when_it_is_back(watch: ServerWatch) -> None:
        assert is_back.wait(PATIENCE_S)
        stop(watch)

    monkeypatch.setattr(ServerWatch, "stop", stop_when_it_is_back)
    code = run(scene, restart, "--divergence", "none", "--max-failure-rate", "0.99")
    summary = read_summary(scene.out)
    records = read_requests(scene.out / "requests.jsonl")
    # A slow machine makes a run INVALID (3), and it has all its artifacts none the less.
    assert code in (0, 3), capsys.readouterr().err
    assert len(records) == NUM_PLANNED and summary.num_failed > 0
    assert summary.cross_check is None
    (note,) = (note for note in summary.notes if "began anew" in note)
    assert note.startswith("the server began anew during the load: tandem_")
    assert "-" not in note.partition(" fell from ")[2]


def test_closed_loop_goes_on_when_the_server_is_back(scene: Scene, capsys: Any) -> None:
    """It is interrupted when the server that came back has answered."""

    def restart() -> None:
        scene.wait_for_records(10)
        scene.server.kill()
        scene.wait_for(lambda records: not records[-1].is_ok)
        scene.server.start()
        scene.server.wait_ready()
        scene.wait_for(lambda records: records[-1].is_ok)
        os.kill(os.getpid(), signal.SIGINT)

    closed = ("--arrival", "closed", "--concurrency", "2", "--duration", "300")
    code = run(scene, restart, "--divergence", "none", *closed)
    complaint = capsys.readouterr().err
    records = read_requests(scene.out / "requests.jsonl")
    failed = [record for record in records if record.status == "UNAVAILABLE"]
    assert code == 4 and f"{len(failed)} of {len(records)} requests failed" in complaint
    # Each of both workers waits 1 s at the least once it has failed five times.
    down_s = max(r.ended_s for r in failed) - min(r.sent_s for r in failed)
    assert 0 < len(failed) <= 2 * (6 + down_s)
    assert records[-1].sent_s > failed[-1].ended_s
    notes = read_summary(scene.out).notes
    assert any("workers of the closed loop waited" in note for note in notes)


def test_run_that_is_terminated_is_summed_up(scene: Scene) -> None:
    command = [sys.executable, "-m", "tandem", *scene.words, "--duration", "300"]
    load = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    scene.wait_for_records(10)
    load.terminate()
    _, complaint = load.communicate(timeout=PATIENCE_S)
    assert load.returncode == 3
    assert "it was interrupted: a part of its load is missing" in complaint.splitlines()[-1]
    summary = read_summary(scene.out)
    assert summary.is_interrupted and summary.num_failed == 0 and summary.num_offered >= 10
    assert not part_files(scene.out)


def test_run_that_is_killed_leaves_what_has_ended(scene: Scene) -> None:
    command = [sys.executable, "-m", "tandem", *scene.words]
    load = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        scene.wait_for_records(10)
    finally:
        load.kill()
        load.wait()
    again = tandem_words(*scene.words)
    assert again.returncode == 1 and "holds a run that died" in again.stderr
    assert f"tandem loadtest report {scene.out}" in again.stderr
    report = tandem_words("loadtest", "report", str(scene.out))
    assert report.returncode == 0, report.stderr
    summary = read_summary(scene.out)
    assert not summary.validity.is_valid and "it died before its end" in report.stdout
    assert 10 <= len(read_requests(scene.out / "requests.jsonl")) < NUM_PLANNED
    assert json.loads((scene.out / "run.json").read_text())["num_requests"] == NUM_PLANNED


def tandem_words(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
