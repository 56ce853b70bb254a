"""A folder has one user at a time, also when that one is killed."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from export.run.lock import FolderInUseError, sole_user
from export.run.stages import StageRunner, StageSpec

HOLD = """
import sys, time
from pathlib import Path
from export.run.lock import sole_user
with sole_user(Path(sys.argv[1]), print):
    print("here", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.kill()


def test_sole_user_beside_another_is_told_who_has_the_folder(tmp_path: Path) -> None:
    said: list[str] = []
    with held_elsewhere(tmp_path) as process:
        owner = f"process {process.pid} on "
        with (
            pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by {owner}.*output_dir"),
            sole_user(tmp_path, said.append, max_wait_s=0),
        ):
            raise AssertionError("there is somebody else")
    assert said == []


def test_sole_user_that_is_killed_leaves_the_folder_to_who_waits(tmp_path: Path) -> None:
    said: list[str] = []
    with held_elsewhere(tmp_path) as process:

        def end_the_other(text: str) -> None:
            said.append(text)
            process.send_signal(signal.SIGKILL)

        with sole_user(tmp_path, end_the_other, max_wait_s=30):
            (text,) = said
    assert text.startswith(f"process {process.pid} on ") and f"builds in {tmp_path}" in text


def test_sole_user_may_come_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        with sole_user(tmp_path / "new" / "folder", print, max_wait_s=0):
            assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder.lock"]


def test_sole_user_of_a_file_system_without_locks_uses_it_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with sole_user(tmp_path, print, max_wait_s=0):
        pass


def test_stages_are_built_by_one_process_and_found_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = partial(sole_user, max_wait_s=0)
    monkeypatch.setattr("export.run.stages.sole_user", impatient)
    finished, missing = (StageSpec(name, {}, (), lambda folder: {}) for name in "ab")
    runner = StageRunner(tmp_path, print)
    runner.run(finished)
    with held_elsewhere(tmp_path):
        assert runner.run(finished).path.exists()
        with pytest.raises(FolderInUseError):
            runner.run(missing)
    assert runner.run(missing).path.exists()
