"""`requests.jsonl`: every request of a run, one per line, as JSON that any reader takes.

JSON knows no NaN: a divergence that is not finite is null in the file and NaN when read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from bundle.errors import UserError
from loadtest.records import RequestRecord

REQUESTS_FILE = "requests.jsonl"
_RECORD = TypeAdapter(RequestRecord)


def write_requests(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write the records to `path`, in the order given."""
    with path.open("wb") as file:
        for record in records:
            file.write(_RECORD.dump_json(record) + b"\n")


def read_requests(path: Path) -> list[RequestRecord]:
    """Return what `write_requests` wrote. UserError: there is no such file, or a line is broken."""
    records = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                records.append(_read(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return records


def _read(line: bytes, where: str) -> RequestRecord:
    try:
        values = json.loads(line)
        for sample in values["samples"]:
            sample["per_token_k3"] = [
                math.nan if k3 is None else k3 for k3 in sample["per_token_k3"]
            ]
        return _RECORD.validate_python(values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is not a request's record: {error}") from None
