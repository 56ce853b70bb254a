"""One load test from its settings to its folder: plan, check, load, score, sum up, draw.

The folder's files: `run.json` (what was asked, of what, on what), `requests.jsonl` (every request),
`summary.json`, `summary.md`, `report.html`. What was recorded is written before it is summed up.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from bundle.errors import UserError
from loadtest.after import score_samples
from loadtest.analysis import summarize
from loadtest.config import RunConfig
from loadtest.crosscheck import Scrape, cross_check, scrape
from loadtest.dataset import load_prompts
from loadtest.find_max import MaxRate, Search
from loadtest.find_max import find_max as search_max
from loadtest.progress import Reporter
from loadtest.records import Phase, Prompt, RequestRecord
from loadtest.report import write_report
from loadtest.requests_file import REQUESTS_FILE, write_requests
from loadtest.schedule import Schedule, plan
from loadtest.slo import Slo, Tally, parse_slo
from loadtest.summary import to_json
from loadtest.summary_text import to_markdown
from loadtest.targets import Credentials
from loadtest.workers import LoadResult, Progress, run_load
from serve.client import AsyncClient, Client, explain

# How often the server's gauges are read: a scrape takes it 5 to 30 ms.
_GAUGE_INTERVAL_S = 2.0
_SCORE_TIMEOUT_S = 300.0
_GAUGES = {
    "waiting": "tandem_sequences_waiting",
    "running": "tandem_sequences_running",
    "batch": "tandem_batch_size",
}
_PACKAGES = ("tandem", "grpcio", "numpy")


def run(config: RunConfig, credentials: Credentials, reporter: Reporter) -> Path:
    """Run a load test and return its folder.

    Raises:
        UserError: the folder is not empty, the dataset or trace is broken, or the server is not
            there or lacks an arm.
    """
    _read_slo(config)
    prompts = load_prompts(config)
    schedule = plan(config, prompts)
    _make_folder(config.out)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    facts = _facts(config, schedule, credentials)
    _write_json(config.out / "run.json", facts)
    reporter.say(
        f"{len(schedule.requests)} requests planned, {schedule.duration_s:.0f} s, "
        f"schedule {schedule.sha256[:12]}"
    )
    before = scrape(config.metrics_url) if config.metrics_url else None
    with _gauges(config) as timeline:
        result = _load(config, by_id, schedule, credentials, reporter, timeline.set_start)
    after = scrape(config.metrics_url) if config.metrics_url else None
    facts |= {"timeline": timeline.by_role, "is_interrupted": result.is_interrupted}
    records = result.records
    write_requests(config.out / REQUESTS_FILE, records)
    facts["divergence_problem"] = _score(config, by_id, records, credentials, reporter)
    write_requests(config.out / REQUESTS_FILE, records)
    _write_json(config.out / "run.json", facts)
    checked = _cross_check(config, before, after, records)
    _sum_up(config, schedule, result, facts, checked)
    return config.out


def find_max(config: RunConfig, credentials: Credentials, reporter: Reporter) -> dict[str, MaxRate]:
    """Search each arm's highest rate that meets the SLO, from the lowest of the rates on.

    Arms are loaded one after the other. Writes `find_max.json`.
    """
    slo = _read_slo(config)
    prompts = load_prompts(config)
    _make_folder(config.out)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}

    def measure_arm(arm: str) -> Callable[[float, int], Sequence[Tally]]:
        def measure(rate_rps: float, num_before: int) -> Sequence[Tally]:
            one = config.model_copy(
                update={"arms": (arm,), "rates_rps": (rate_rps,), "seed": config.seed + num_before}
            )
            result = _load(one, by_id, plan(one, prompts), credentials, reporter)
            measured = [r for r in result.records if r.plan.phase is Phase.MEASURED]
            return slo.tallies(measured)

        return measure

    found = {}
    search = Search(start_rps=min(config.rates_rps))
    for arm in config.arms:
        found[arm] = search_max(
            measure_arm(arm),
            search,
            lambda step, arm=arm: reporter.say(  # type: ignore[misc]
                f"{arm} at {step.rate_rps:g} requests/s: {step.verdict.value}"
            ),
        )
    shown = {
        arm: {"meets_rps": each.meets_rps, "fails_rps": each.fails_rps}
        for arm, each in found.items()
    }
    _write_json(config.out / "find_max.json", {"slo": config.slo, "arms": shown})
    return found


def _read_slo(config: RunConfig) -> Slo:
    """Return the SLO; UserError when it cannot be read, before anything is sent."""
    try:
        return parse_slo(config.slo)
    except ValueError as error:
        raise UserError(f"--slo: {error}") from None


def _make_folder(folder: Path) -> None:
    """Make the folder of a run; UserError when there is something in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--out {folder} is not empty; give a new folder")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# --- what is said of a run


def _facts(config: RunConfig, schedule: Schedule, credentials: Credentials) -> dict[str, Any]:
    return {
        "command": ["tandem", *sys.argv[1:]],
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "schedule_sha256": schedule.sha256,
        "num_requests": len(schedule.requests),
        "machine": {
            "num_cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "system": platform.system(),
        },
        "versions": _versions(),
        "models": _models(config, credentials),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _models(config: RunConfig, credentials: Credentials) -> list[dict[str, Any]]:
    """Return what the server says of its models; nothing where it does not speak our protocol."""
    if config.protocol != "tandem":
        return []
    try:
        with Client(
            config.target, token=credentials.token, tls=credentials.tls, timeout_s=config.timeout_s
        ) as client:
            models = client.get_models().models
    except (OSError, ValueError) as error:
        raise UserError(f"--target {config.target}: {error}") from None
    except grpc.RpcError as error:
        raise UserError(f"--target {config.target}: {explain(error)}") from None
    return [MessageToDict(model, preserving_proto_field_name=True) for model in models]


# --- the load


def _load(
    config: RunConfig,
    prompts: Mapping[str, Prompt],
    schedule: Schedule,
    credentials: Credentials,
    reporter: Reporter,
    on_start: Callable[[float], None] = lambda start_s: None,
) -> LoadResult:
    """Send the schedule; `on_start` is told when its clock began, on the monotonic one."""
    with reporter.track("load") as on_done:

        def on_progress(progress: Progress) -> None:
            on_start(time.monotonic() - progress.elapsed_s)
            on_done(min(progress.elapsed_s, schedule.duration_s), schedule.duration_s)

        return run_load(config, prompts, schedule.blocks, on_progress, credentials)


class _Timeline:
    """The server's gauges over the run's time, by role; read on a thread of its own."""

    def __init__(self, url: str) -> None:
        self.by_role: dict[str, list[dict[str, float]]] = {}
        self._url = url
        self._start_s: float | None = None
        self._is_over = Event()
        self._thread = Thread(target=self._read_on, name="gauges")

    def set_start(self, start_s: float) -> None:
        self._start_s = start_s

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _read_on(self) -> None:
        while not self._is_over.wait(_GAUGE_INTERVAL_S):
            if self._start_s is None:
                continue
            try:
                found = scrape(self._url)
            except UserError:
                continue  # the scrape behind the load tells it, if it lasts
            self._take(found, time.monotonic() - self._start_s)

    def _take(self, found: Scrape, time_s: float) -> None:
        for labels in found.of(_GAUGES["running"]):
            role = dict(labels)["role"]
            values = {
                name: sum(found.of(metric, role=role).values()) for name, metric in _GAUGES.items()
            }
            self.by_role.setdefault(role, []).append({"time_s": time_s, **values})


@contextmanager
def _gauges(config: RunConfig) -> Iterator[_Timeline]:
    """Read the server's gauges during the block, if there is anywhere to read them."""
    timeline = _Timeline(config.metrics_url or "")
    if config.metrics_url is None:
        yield timeline
        return
    timeline.start()
    try:
        yield timeline
    finally:
        timeline.stop()


# --- behind the load


def _score(
    config: RunConfig,
    prompts: Mapping[str, Prompt],
    records: Sequence[RequestRecord],
    credentials: Credentials,
    reporter: Reporter,
) -> str:
    """Set the records' divergences; returns why there are none, or ""."""
    if config.divergence == "none":
        return "not asked for"
    if config.protocol != "tandem":
        return "only a Tandem server scores"

    async def score() -> str:
        async with AsyncClient(
            config.target,
            token=credentials.token,
            tls=credentials.tls,
            timeout_s=_SCORE_TIMEOUT_S,
        ) as client:
            return await score_samples(client, config, prompts, records, on_done)

    with reporter.track("divergences") as on_done:
        problem = asyncio.run(score())
    if problem:
        reporter.say(f"no divergences: {problem}")
    return problem


def _cross_check(
    config: RunConfig,
    before: Scrape | None,
    after: Scrape | None,
    records: Sequence[RequestRecord],
) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    found = cross_check(before, after, records, config.arms)
    return {
        "agrees": found.agrees,
        "ttft": [{**asdict(check), "agrees": check.agrees} for check in found.ttft],
        "counts": [{**asdict(check), "agrees": check.agrees} for check in found.counts],
    }


def _sum_up(
    config: RunConfig,
    schedule: Schedule,
    result: LoadResult,
    facts: Mapping[str, Any],
    checked: dict[str, Any] | None,
) -> None:
    summary = summarize(
        config,
        schedule.sha256,
        result.records,
        result.costs,
        versions=facts["versions"],
        models=facts["models"],
        cross_check=checked,
        is_interrupted=result.is_interrupted,
    )
    (config.out / "summary.json").write_text(to_json(summary), encoding="utf-8")
    (config.out / "summary.md").write_text(to_markdown(summary), encoding="utf-8")
    write_report(config.out)
