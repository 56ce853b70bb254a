from __future__ import annotations

import io
import sys

import pytest

from loadtest.progress import ProgressReporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_has_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter().track("load") as on_progress:
        for done in range(101):
            on_progress(done, 100)
    printed = capsys.readouterr()
    assert [line.split("] ")[1] for line in printed.err.splitlines()] == [
        f"load: {percent} %" for percent in range(10, 101, 10)
    ]
    assert printed.out == ""


def test_log_skips_the_tenths_that_were_never_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter().track("score") as on_progress:
        for done in range(1, 4):
            on_progress(done, 3)
        on_progress(3, 3)
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "30 %",
        "60 %",
        "100 %",
    ]


def test_nothing_to_do_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter().track("score") as on_progress:
        on_progress(0, 0)
    assert "score: 100 %" in capsys.readouterr().err


def test_terminal_has_a_bar_that_gives_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressReporter().track("load") as on_progress:
        on_progress(1, 2)
        on_progress(2, 2)
    shown = terminal.getvalue()
    assert "load" in shown
    assert "100%" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
