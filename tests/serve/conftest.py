"""The command line, for tests of the rooms that have commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tandem.cli


@pytest.fixture
def tandem_main(
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line; returns its exit code, what it printed and what it complained of."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            tandem.cli.main([*map(str, words)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run
