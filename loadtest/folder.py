"""A run's folder: `run.json`, and what is there of a run, a finished one or one that died."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundle.errors import UserError
from loadtest.analysis.summary import SUMMARY_FILE
from loadtest.client.requests_file import REQUESTS_FILE, part_files, read_parts, read_requests
from loadtest.records import RequestRecord

RUN_FILE = "run.json"
FIND_MAX_FILE = "find_max.json"
SUMMARY_TEXT_FILE = "summary.md"
REPORT_FILE = "report.html"
_FILES = (RUN_FILE, FIND_MAX_FILE, REQUESTS_FILE, SUMMARY_FILE, SUMMARY_TEXT_FILE, REPORT_FILE)


def make_folder(folder: Path, *, may_overwrite: bool = False) -> None:
    """Make the folder of a run, without the files of an earlier one where that may be.

    Raises:
        UserError: there is something in it; says what, and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return
        if not may_overwrite or not is_run(folder):
            raise UserError(f"--out {folder} {_describe(folder)}")
        for path in (*(folder / name for name in _FILES), *part_files(folder)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() or (folder / FIND_MAX_FILE).is_file()


def is_partial(folder: Path) -> bool:
    """Say whether a run died before it was summed up."""
    return (folder / RUN_FILE).is_file() and not (folder / SUMMARY_FILE).is_file()


def _describe(folder: Path) -> str:
    if not is_run(folder):
        return "is not empty, and holds no load test; give a new folder"
    if is_partial(folder):
        return (
            f"holds a run that died: {len(read_records(folder))} of its requests are there. "
            f"`tandem loadtest report {folder}` sums them up; give a new folder, or --overwrite"
        )
    return "is not empty: it holds a finished run; give a new folder, or --overwrite"


def read_records(folder: Path) -> list[RequestRecord]:
    """Return all requests of a run, also of one that died. UserError: a file of it is broken."""
    path = folder / REQUESTS_FILE
    return read_requests(path) if path.is_file() else read_parts(part_files(folder))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file of the folder; UserError where that cannot be."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of the folder; UserError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_run(folder: Path) -> dict[str, Any]:
    """Return run.json. UserError: it is missing or broken."""
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes: {error}") from None
    if not isinstance(run, dict):
        raise UserError(f"{path} is not what a run writes: it is no JSON object")
    return run
