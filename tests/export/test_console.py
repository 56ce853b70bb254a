from __future__ import annotations

import sys

import pytest
from rich.progress import Progress

from export.console import ConsoleReporter


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter([0.0, 0.0, 4.0, 11.0, 11.0, 11.0, 12.0, 13.0, 13.0, 13.0])
    show = ConsoleReporter(clock=lambda: next(clock)).track("training steps")
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
    stopped: list[Progress] = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Progress, "stop", lambda bar: stopped.append(bar))
    reporter = ConsoleReporter()
    reporter.track("training steps")(1, 2)
    assert stopped == []
    reporter.close()
    assert len(stopped) == 1
