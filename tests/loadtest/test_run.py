"""What becomes of a run when something goes wrong behind the load, or in the middle of a search."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import UserError
from loadtest import run as run_module
from loadtest.client.process import LoadResult
from loadtest.client.targets import Credentials
from loadtest.config import RunConfig
from loadtest.progress import ProgressReporter
from loadtest.records import RequestRecord
from loadtest.scoring import score_run
from tests.support.load_tests import planned, recorded


def records_of(status: str) -> list[RequestRecord]:
    return [recorded(planned(n), 0.1, ended_s=0.2, status=status) for n in range(400)]


def test_ctrl_c_ends_the_scoring_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*given: Any) -> str:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr("loadtest.scoring.score_samples", interrupted)
    config = RunConfig(out=tmp_path, target="127.0.0.1:1")
    assert score_run(config, {}, [], Credentials(), ProgressReporter()) == "interrupted"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Search the highest rate where each load ends as it is told."""
    monkeypatch.setattr(run_module, "ask_models", lambda *given: [])

    def search(*results: LoadResult) -> dict[str, Any]:
        left = iter(results)
        monkeypatch.setattr(run_module, "run_load", lambda *given: next(left))
        config = RunConfig(out=tmp_path / "max", arms=("student",), slo="ttft_p95=1")
        with pytest.raises(UserError) as caught:
            run_module.find_max(config, Credentials(), ProgressReporter())
        found: dict[str, Any] = json.loads((config.out / "find_max.json").read_text())
        return {"error": str(caught.value), **found}

    yield search


def test_search_whose_server_goes_away_keeps_what_it_found(search: Any) -> None:
    found = search(LoadResult(records_of("OK"), []), LoadResult(records_of("UNAVAILABLE"), []))
    assert found["error"] == "student at 2 requests/s: the server went away"
    assert found["steps"] == {"student": [{"rate_rps": 1.0, "verdict": "meets"}]}
    assert found["arms"] == {}


def test_search_that_is_interrupted_keeps_what_it_found(search: Any) -> None:
    cut = LoadResult(records_of("OK")[:3], [], is_interrupted=True, problems=("interrupted",))
    found = search(LoadResult(records_of("OK"), []), cut)
    assert found["error"] == "student at 2 requests/s: interrupted"
    assert len(found["steps"]["student"]) == 1
