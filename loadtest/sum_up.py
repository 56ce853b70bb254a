"""What a run's folder comes to, from `run.json` and the requests: also of a run that died."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from bundle.errors import UserError
from loadtest.analysis.analysis import summarize
from loadtest.analysis.summary import SUMMARY_FILE, Summary, to_json
from loadtest.client.requests_file import REQUESTS_FILE, write_requests
from loadtest.client.runner import BlockCost
from loadtest.config import RunConfig
from loadtest.folder import RUN_FILE, SUMMARY_TEXT_FILE, read_records, read_run, write_text
from loadtest.records import Phase, RequestRecord
from loadtest.report.page import write_report
from loadtest.report.summary_text import to_markdown

DIED = "it died before its end: a part of its load is missing"


def sum_up(folder: Path) -> Summary:
    """Write `summary.json`, `summary.md` and `report.html`, and return the summary.

    A run that died before its load was over is INVALID.

    Raises:
        UserError: a file of the folder is missing or broken.
    """
    run, records = read_run(folder), read_records(folder)
    try:
        config = RunConfig.model_validate(run["config"])
        costs = [BlockCost(**cost) for cost in run.get("costs", ())]
        summary = summarize(
            config,
            run["schedule_sha256"],
            records,
            costs,
            versions=run["versions"],
            models=run["models"],
            cross_check=run.get("cross_check"),
            problems=run.get("problems", (DIED,)),
            is_interrupted=run.get("is_interrupted", True),
            notes=(*run.get("notes", ()), *_notes(costs, records)),
        )
    except KeyError as error:
        raise UserError(f"{folder / RUN_FILE} is not what a run writes: no {error}") from None
    except (TypeError, ValidationError) as error:
        raise UserError(f"{folder / RUN_FILE} is not what a run writes: {error}") from None
    write_requests(folder / REQUESTS_FILE, records)
    write_text(folder / SUMMARY_FILE, to_json(summary))
    write_text(folder / SUMMARY_TEXT_FILE, to_markdown(summary))
    write_report(folder)
    return summary


def _notes(costs: Sequence[BlockCost], records: Sequence[RequestRecord]) -> Iterator[str]:
    paused_s = sum(cost.paused_s for cost in costs)
    if paused_s:
        yield (
            f"workers of the closed loop waited {paused_s:.1f} s in all behind failures, and sent "
            "nothing meanwhile"
        )
    warmup = [record for record in records if record.plan.phase is Phase.WARMUP]
    failed = Counter(record.status for record in warmup if not record.is_ok)
    if failed:
        kinds = ", ".join(f"{count} {status}" for status, count in failed.items())
        yield f"{failed.total()} of {len(warmup)} requests of the warm-up failed: {kinds}"
