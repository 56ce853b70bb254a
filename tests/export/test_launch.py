"""The launcher's exit codes. Two machines of it: tests/deploy/test_distill_job.py."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from export import launch
from export.run import peers

Start = Callable[..., subprocess.Popen[str]]
WAIT_S = 60
PROCESS = """
import os, signal, sys, time
rank, wanted = int(os.environ["RANK"]), sys.argv[1]
if wanted == "wait":
    print("waiting", flush=True)
    time.sleep(60)
if rank == 1 and wanted.startswith("-"):
    os.kill(os.getpid(), -int(wanted))
if rank == 1:
    sys.exit(int(wanted))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    options = ["--multi_gpu", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]

    with ExitStack() as stack:

        def start(wanted: str) -> subprocess.Popen[str]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = f"--main_process_port={free.getsockname()[1]}"
            process = subprocess.Popen(
                [sys.executable, "-m", "export.launch", "--num_machines=1", *options, port,
                 str(script), wanted],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.mark.parametrize(("of_process", "expected"), [(1, 1), (3, 3), (5, 5), (-9, 137)])
def test_exit_code_of_a_process_is_that_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, of_process: int, expected: int
) -> None:
    def fail(arguments: object) -> None:
        failure = ProcessFailure(0, 4711, of_process, "no file")
        raise ChildFailedError("export", {0: failure})

    monkeypatch.setattr(launch, "launch_command", fail)
    assert launch.launch(argparse.Namespace()) == expected


def test_first_process_that_failed_gives_the_exit_code(start: Start) -> None:
    """The other one is ended, whose SIGTERM is not what happened."""
    assert start("3").wait(WAIT_S) == 3


@pytest.mark.nightly
@pytest.mark.parametrize(("wanted", "expected"), [("0", 0), ("5", 5), ("-9", 137)])
def test_exit_code_goes_through_the_launcher(start: Start, wanted: str, expected: int) -> None:
    assert start(wanted).wait(WAIT_S) == expected


def test_stopped_launcher_ends_its_processes_and_says_5(start: Start) -> None:
    process = start("wait")
    assert process.stdout and process.stdout.read(7) == "waiting"
    process.terminate()
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 5
    assert errors.endswith("launch: ended by SIGTERM\n")


@pytest.fixture
def _own_signals() -> Iterator[None]:
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


MACHINE_0 = ["--num_machines=2", "--machine_rank=0", "--main_process_ip=127.0.0.1"]


@pytest.mark.usefixtures("_own_signals")
def test_machines_that_do_not_come_are_named_with_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "MAX_WAIT_S", 0.1)
    assert launch.main([*MACHINE_0, "--main_process_port=0", "x.py"]) == 5
    assert "launch: waited in vain for the machines [1]" in capsys.readouterr().err


@pytest.mark.usefixtures("_own_signals")
def test_signal_before_anything_runs_is_answered_with_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meet(machine: peers.Node, on_loss: Callable[[str], None], timeout_s: float) -> None:
        assert machine == peers.Node(0, 2, "127.0.0.1", 29501)
        on_loss("machine 1 is gone")
        raise AssertionError("the signal has been raised")

    monkeypatch.setattr(peers.Peers, "meet", meet)
    assert launch.main([*MACHINE_0, "--main_process_port=29500", "x.py"]) == 5
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("launch: machine 1 is gone: this machine ends too")
    assert last == "launch: ended by SIGTERM"


@pytest.mark.usefixtures("_own_signals")
def test_several_machines_need_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch.main(["--num_machines=2", "--machine_rank=1", "x.py"])
    said = capsys.readouterr().err
    assert "several machines need --main_process_ip, --main_process_port" in said
