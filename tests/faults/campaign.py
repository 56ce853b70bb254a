"""The fault matrix at its published size, as a table.

    python -m tests.faults.campaign [--full] [--only R1,R7] [--out FILE] [--markdown]

Without `--full` it runs the size that the tests run. Finished rows are kept in the file: the same
command goes on where it was stopped (`--again` starts anew). The table ends with the commits that
its rows ran on. Exit code 1 where a row failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from bench.peers.machine import describe_machine
from tests.faults.result import Row, Size

FOLDER = Path(__file__).parent


def find_rows() -> dict[str, str]:
    """Return the module of each row, by its name: "R1" → "tests.faults.callers.r01_cancel"."""
    found = sorted(FOLDER.glob("*/r[0-9][0-9]_*.py"), key=lambda path: path.stem)
    return {f"R{int(p.stem[1:3])}": f"tests.faults.{p.parent.name}.{p.stem}" for p in found}


def load(module: str) -> Row:
    return cast(Row, importlib.import_module(module))


def run_rows(names: Iterable[str], size: Size, out: Path | None) -> list[dict[str, Any]]:
    """Run rows that the file does not have yet, and keep each as it ends."""
    rows = find_rows()
    done = _read(out, size)
    commit = _commit()
    for name in names:
        if name in done:
            continue
        started_s = time.monotonic()
        print(f"{name} {rows[name]} …", file=sys.stderr, flush=True)
        result = load(rows[name]).run(size).to_json()
        seconds = round(time.monotonic() - started_s, 1)
        done[name] = result | {"seconds": seconds, "commit": commit}
        _write(out, size, done)
    return [done[name] for name in names]


def _commit() -> str:
    """Return the commit of this working tree, "-dirty" where it has changes; empty without git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _read(out: Path | None, size: Size) -> dict[str, dict[str, Any]]:
    if out is None or not out.exists():
        return {}
    kept = json.loads(out.read_text(encoding="utf-8"))
    if kept["size"] != size.value:
        raise SystemExit(f"{out} has rows of size {kept['size']}; give --again, or another --out")
    rows: dict[str, dict[str, Any]] = kept["rows"]
    return rows


def _write(out: Path | None, size: Size, rows: dict[str, dict[str, Any]]) -> None:
    if out is None:
        return
    report = {
        "size": size.value,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "rows": rows,
    }
    temporary = out.with_suffix(".partial")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def render(results: Sequence[dict[str, Any]], style: box.Box = box.HEAVY_HEAD) -> Table:
    """Return the table of the campaign."""
    table = Table("row", "fault", box=style)
    for name in ("requests", "lost", "duplicated", "altered", "leaked", "latency", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in results:
        ratio = row["latency_ratio"]
        table.add_row(
            row["row"],
            row["fault"],
            f"{row['num_requests']:,}",
            *(str(row[f"num_{name}"]) for name in ("lost", "duplicated", "altered")),
            str(len(row["leaks"])),
            "" if ratio is None else f"{ratio:.2f}×",
            f"{row['seconds']:.0f}",
            "passed" if row["is_passed"] else "FAILED",
        )
    num_failed = sum(not row["is_passed"] for row in results)
    table.add_row(
        "all",
        f"{len(results)} faults",
        f"{sum(row['num_requests'] for row in results):,}",
        *(str(sum(row[f"num_{n}"] for row in results)) for n in ("lost", "duplicated", "altered")),
        str(sum(len(row["leaks"]) for row in results)),
        "",
        f"{sum(row['seconds'] for row in results):.0f}",
        f"{num_failed} failed" if num_failed else "passed",
    )
    return table


def main() -> int:
    """Run the campaign from the command line, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="the published size")
    parser.add_argument("--only", default="", help="rows, by comma")
    parser.add_argument("--out", type=Path, help="JSON of what was found")
    parser.add_argument("--again", action="store_true", help="forget what the file has")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args()
    rows = find_rows()
    names = given.only.split(",") if given.only else sorted(rows, key=lambda name: int(name[1:]))
    if unknown := [name for name in names if name not in rows]:
        parser.error(f"--only {','.join(unknown)}: the rows are {', '.join(rows)}")
    if given.again and given.out:
        given.out.unlink(missing_ok=True)
    results = run_rows(names, Size.FULL if given.full else Size.CI, given.out)
    style = box.MARKDOWN if given.markdown else box.HEAVY_HEAD
    Console(width=160).print(render(results, style))
    print("commits:", ", ".join(sorted({row["commit"] for row in results})))
    for row in results:
        for problem in [*row["leaks"], *row["problems"]]:
            print(re.sub(r"\s+", " ", f"{row['row']}: {problem}"))
    return 0 if all(row["is_passed"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
