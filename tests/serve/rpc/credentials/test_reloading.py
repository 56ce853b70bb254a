"""Values that follow their files."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bundle.errors import UserError
from serve.rpc.credentials.reloading import Reloaded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "value"
    path.write_text("one")
    return path


def load(path: Path) -> str:
    """A file that says "bad" cannot be loaded."""
    text = path.read_text() if path.exists() else "bad"
    if text == "bad":
        raise UserError(f"{path.name} is bad")
    return text


def test_value_is_loaded_once_while_the_file_stays(path: Path) -> None:
    loads: list[int] = []
    reloaded = Reloaded([path], lambda: loads.append(0))
    for _ in range(3):
        reloaded.current()
    assert len(loads) == 1


@pytest.mark.parametrize("is_replaced", [False, True])
def test_changed_file_is_loaded_again(path: Path, is_replaced: bool) -> None:
    reloaded = Reloaded([path], lambda: load(path))
    newer = path.with_name("newer") if is_replaced else path
    newer.write_text("three")
    newer.replace(path)
    assert reloaded.current() == "three"


def test_second_file_is_watched_too(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    reloaded = Reloaded([path, other], lambda: (load(path), other.exists()))
    other.touch()
    assert reloaded.current() == ("one", True)


def test_first_load_passes_its_error_on(path: Path) -> None:
    path.write_text("bad")
    with pytest.raises(UserError, match="value is bad"):
        Reloaded([path], lambda: load(path))


@pytest.mark.parametrize("is_deleted", [False, True])
def test_change_that_cannot_be_loaded_is_logged_once_and_keeps_the_value(
    path: Path, is_deleted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reloaded = Reloaded([path], lambda: load(path))
    path.unlink()
    if not is_deleted:
        path.write_text("bad")
    assert [reloaded.current() for _ in range(3)] == ["one"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "value is bad; what was loaded before stays in use"
    ]
    path.write_text("good")
    assert reloaded.current() == "good"


def test_files_are_looked_at_once_per_interval(path: Path) -> None:
    now_s = 10.0
    reloaded = Reloaded([path], lambda: load(path), min_interval_s=1, clock=lambda: now_s)
    path.write_text("three")
    now_s = 10.9
    assert reloaded.current() == "one"
    now_s = 11.0
    assert reloaded.current() == "three"


def test_nobody_waits_for_a_load_on_another_thread(path: Path) -> None:
    is_loading, may_load = threading.Event(), threading.Event()
    may_load.set()

    def load_slowly() -> str:
        is_loading.set()
        assert may_load.wait(10)
        return load(path)

    reloaded = Reloaded([path], load_slowly)
    is_loading.clear()
    may_load.clear()
    path.write_text("three")
    thread = threading.Thread(target=reloaded.current)
    thread.start()
    assert is_loading.wait(10)
    assert reloaded.current() == "one"
    may_load.set()
    thread.join()
    assert reloaded.current() == "three"
