"""`scripts/check_page`, and a whole page of a load test under it where there is a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.report.page import render_report
from tests.support.loadtest.runs import PLOTS, RECORDS, RUN, SUMMARY

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_page"
BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


def check_page(page: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([SCRIPT, page], capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_browser_shows_every_plot_without_a_complaint(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(SUMMARY, RUN, RECORDS), encoding="utf-8")
    returncode, found = check_page(page)
    assert found["problems"] == []
    assert (returncode, found["plots"]) == (0, list(PLOTS))


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_browser_check_finds_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        """<html><head><meta http-equiv="Content-Security-Policy" content="default-src 'none'">
        </head><body><img src="nowhere.png"><figure id="a"><svg width="400" height="200">
        <text x="9" y="50">over</text><text x="12" y="52">under</text><text x="390" y="90">out of
        it</text></svg></figure><figure id="b"><svg width="400" height="20"></svg></figure>
        </body></html>""",
        encoding="utf-8",
    )
    returncode, found = check_page(page)
    problems = "\n".join(found["problems"])
    assert returncode == 1
    for words in (
        'plot a: "under" covers "over"', "leaves the plot", "plot b does not show",
        "plot b has no text", "Content Security Policy",
    ):  # fmt: skip
        assert words in problems


def test_browser_check_without_a_browser_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "report.html"],
        capture_output=True, text=True, timeout=60, check=False, env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no browser: none of chromium" in done.stderr
