"""One load test from its settings to its folder: plan, check, load, score, sum up, draw.

The folder's files: `run.json` (what was asked, of what, on what), `requests.jsonl` (every request),
`summary.json`, `summary.md`, `report.html`. What was recorded is on disk before anything else is
asked of the server, and what a run died over is summed up by `tandem loadtest report`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bundle.errors import UserError
from loadtest.analysis.cross_check import cross_check
from loadtest.client.process import LoadResult, Progress
from loadtest.client.requests_file import REQUESTS_FILE, part_files, write_requests
from loadtest.client.targets import Credentials
from loadtest.client.workers import run_load
from loadtest.config import RunConfig, Tally, parse_slo
from loadtest.facts import ask_models, describe_run
from loadtest.folder import FIND_MAX_FILE, RUN_FILE, make_folder, write_json
from loadtest.progress import ProgressReporter
from loadtest.records import DatasetPrompt, Phase, RequestRecord
from loadtest.scoring import score_run
from loadtest.server_metrics import ServerWatch
from loadtest.sum_up import sum_up
from loadtest.verdicts.find_max import MaxRate, RateStep, Search
from loadtest.verdicts.find_max import find_max as search_max
from loadtest.workload.dataset import load_prompts
from loadtest.workload.schedule import Schedule, plan


def run(
    config: RunConfig,
    credentials: Credentials,
    reporter: ProgressReporter,
    *,
    may_overwrite: bool = False,
) -> Path:
    """Run a load test and return its folder.

    Raises:
        UserError: there is something in the folder, the dataset or trace is broken, or the server
            is not there or lacks an arm.
    """
    prompts = load_prompts(config)
    schedule = plan(config, prompts)
    make_folder(config.out, may_overwrite=may_overwrite)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    facts = describe_run(config, schedule, credentials, reporter)
    write_json(config.out / RUN_FILE, facts)
    reporter.say(
        f"{len(schedule.requests)} requests planned, {schedule.duration_s:.0f} s, "
        f"schedule {schedule.sha256[:12]}"
    )
    with _watching(config, reporter) as watch:
        on_start = watch.set_start if watch else _ignore
        result = _load(config, by_id, schedule, credentials, reporter, on_start, config.out)
        _keep(config.out, result.records)
    facts |= {
        "is_interrupted": result.is_interrupted,
        "problems": result.problems,
        "costs": [asdict(cost) for cost in result.costs],
        **_server_facts(config, watch, result.records),
    }
    write_json(config.out / RUN_FILE, facts)
    if result.is_interrupted:
        facts["divergence_problem"] = "the run was interrupted"
    else:
        facts["divergence_problem"] = score_run(
            config, by_id, result.records, credentials, reporter
        )
        write_requests(config.out / REQUESTS_FILE, result.records)
    write_json(config.out / RUN_FILE, facts)
    sum_up(config.out)
    return config.out


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON can hold: an edge that is infinite is None."""
    return {key: None if value == math.inf else value for key, value in values.items()}


def _ignore(start_s: float) -> None: ...


def _keep(folder: Path, records: Sequence[RequestRecord]) -> None:
    """Write all records into one file in place of those of the processes."""
    write_requests(folder / REQUESTS_FILE, records)
    for path in part_files(folder):
        path.unlink()


def find_max(
    config: RunConfig,
    credentials: Credentials,
    reporter: ProgressReporter,
    *,
    may_overwrite: bool = False,
) -> dict[str, MaxRate]:
    """Search each arm's highest rate that meets the SLO, from the lowest of the rates on.

    Arms are loaded one after the other. `find_max.json` has every step from its end on.

    Raises:
        UserError: as `run`, or the server went away: no request of a step was answered.
    """
    slo = parse_slo(config.slo)
    prompts = load_prompts(config)
    make_folder(config.out, may_overwrite=may_overwrite)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    ask_models(config, credentials, reporter)
    found: dict[str, MaxRate] = {}
    steps: dict[str, list[RateStep]] = {arm: [] for arm in config.arms}

    def write() -> None:
        write_json(config.out / FIND_MAX_FILE, _found(config, found, steps))

    def measure_arm(arm: str) -> Callable[[float, int], Sequence[Tally]]:
        def measure(rate_rps: float, num_before: int) -> Sequence[Tally]:
            one = config.model_copy(
                update={"arms": (arm,), "rates_rps": (rate_rps,), "seed": config.seed + num_before}
            )
            result = _load(one, by_id, plan(one, prompts), credentials, reporter)
            measured = [r for r in result.records if r.plan.phase is Phase.MEASURED]
            if result.problems:
                raise UserError(f"{arm} at {rate_rps:g} requests/s: {result.problems[0]}")
            if all(record.status == "UNAVAILABLE" for record in measured):
                raise UserError(f"{arm} at {rate_rps:g} requests/s: the server went away")
            return slo.tallies(measured)

        return measure

    def on_step(arm: str, step: RateStep) -> None:
        reporter.say(f"{arm} at {step.rate_rps:g} requests/s: {step.verdict.value}")
        steps[arm].append(step)
        write()

    search = Search(start_rps=min(config.rates_rps))
    for arm in config.arms:
        found[arm] = search_max(measure_arm(arm), search, lambda step, arm=arm: on_step(arm, step))  # type: ignore[misc]
        write()
    return found


def _found(
    config: RunConfig, found: Mapping[str, MaxRate], steps: Mapping[str, Sequence[RateStep]]
) -> dict[str, Any]:
    """Return find_max.json: the highest rates of the arms that are done, and all steps so far."""
    rates = {
        arm: {"meets_rps": each.meets_rps, "fails_rps": each.fails_rps}
        for arm, each in found.items()
    }
    tried = {
        arm: [{"rate_rps": step.rate_rps, "verdict": step.verdict.value} for step in of]
        for arm, of in steps.items()
    }
    return {"slo": config.slo, "arms": rates, "steps": tried}


# --- the load


def _load(
    config: RunConfig,
    prompts: Mapping[str, DatasetPrompt],
    schedule: Schedule,
    credentials: Credentials,
    reporter: ProgressReporter,
    on_start: Callable[[float], None] = _ignore,
    folder: Path | None = None,
) -> LoadResult:
    """Send the schedule; `on_start` is told when its clock began, on the monotonic one.

    Records are in the folder, if there is one, from the end of their block on.
    """
    with reporter.track("load") as on_done:

        def on_progress(progress: Progress) -> None:
            on_start(time.monotonic() - progress.elapsed_s)
            on_done(min(progress.elapsed_s, schedule.duration_s), schedule.duration_s)

        result = run_load(config, prompts, schedule.blocks, on_progress, credentials, folder)
    for problem in result.problems:
        reporter.say(problem)
    return result


@contextmanager
def _watching(config: RunConfig, reporter: ProgressReporter) -> Iterator[ServerWatch | None]:
    """Read the server's metrics around and during the block, if there is anywhere to read them."""
    if config.metrics_url is None:
        yield None
        return
    watch = ServerWatch(config.metrics_url)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        for note in watch.notes:
            reporter.say(note)


# --- behind the load


def _server_facts(
    config: RunConfig, watch: ServerWatch | None, records: Sequence[RequestRecord]
) -> dict[str, Any]:
    """Return what the server's metrics say of a run; nothing where nobody looked at them."""
    if watch is None:
        return {}
    facts: dict[str, Any] = {"timeline": watch.timeline, "notes": watch.notes}
    if watch.after is None or watch.is_restarted:
        return facts
    found = cross_check(watch.before, watch.after, records, config.arms)
    checked = {
        "agrees": found.agrees,
        "ttft": [_finite({**asdict(check), "agrees": check.agrees}) for check in found.ttft],
        "counts": [{**asdict(check), "agrees": check.agrees} for check in found.counts],
    }
    return {**facts, "cross_check": checked}
