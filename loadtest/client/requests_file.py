"""`requests.jsonl`: every request of a run, one per line, as JSON that any reader takes.

While a run goes on, each client process has a file of its own, `requests.PROCESS.part.jsonl`: of a
run that died they are all that is left. JSON knows no NaN: a divergence that is not finite is null
in the file and NaN when read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter

from bundle.atomic import write_atomically
from bundle.errors import UserError
from loadtest.records import RequestRecord

REQUESTS_FILE = "requests.jsonl"
_PARTS = "requests.*.part.jsonl"
_RECORD = TypeAdapter(RequestRecord)


def write_requests(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write the records to `path`, in the order given; what was there stays until all are written.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with write_atomically(path) as partial, partial.open("wb") as file:
            file.writelines(map(_to_line, records))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_requests(path: Path) -> list[RequestRecord]:
    """Return what `write_requests` wrote. UserError: there is no such file, or a line is broken."""
    return list(_read_lines(path))


def part_file(folder: Path, process: int) -> Path:
    """Return the file in which a client process keeps its records while the run goes on."""
    return folder / _PARTS.replace("*", str(process))


def part_files(folder: Path) -> list[Path]:
    """Return the files of all processes that are there."""
    return sorted(folder.glob(_PARTS))


@contextmanager
def keeping(path: Path | None) -> Iterator[Callable[[Sequence[RequestRecord]], None]]:
    """Yield a function that adds records to a file, and has them on disk when it returns.

    It does nothing where `path` is None, and raises UserError where the file cannot be written.
    """
    if path is None:
        yield lambda records: None
        return

    def keep(records: Sequence[RequestRecord]) -> None:
        try:
            file.writelines(map(_to_line, records))
            file.flush()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    try:
        file = path.open("ab")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield keep
    finally:
        with suppress(OSError):  # told by `keep`, which leaves nothing to be written
            file.close()


def read_parts(paths: Iterable[Path]) -> list[RequestRecord]:
    """Return the records of some processes, by number; a line that was begun is left out.

    Raises:
        UserError: a file cannot be read, or a line before its last one is broken.
    """
    records = [record for path in paths for record in _read_lines(path, may_be_torn=True)]
    return sorted(records, key=lambda record: record.plan.number)


def _to_line(record: RequestRecord) -> bytes:
    return _RECORD.dump_json(record) + b"\n"


def _read_lines(path: Path, *, may_be_torn: bool = False) -> Iterator[RequestRecord]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if may_be_torn and not line.endswith(b"\n"):
                    return
                yield _read(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


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
