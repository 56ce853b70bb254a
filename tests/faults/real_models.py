"""Callers of every kind over real models: answers among others are those of a request alone.

    python -m tests.faults.real_models --bundle DIR [--seconds S] [flags of tandem serve]

The rows have models whose answers are known. Here `tandem serve` runs a bundle as it is, with the
runtimes, caches and arithmetic that it has. Every template of `caller` is answered by itself; then
two callers stream, compare, score, leave, hurry and err at once. The ledger holds what they wrote
down against the answers of before. Exit code 1 where something is lost, duplicated or altered.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.ledger.journal import Journal, read_journal
from loadtest.ledger.ledger import Ledger, check, render
from tests.faults.caller import Caller
from tests.support.processes import TandemProcess, running

_NUM_CALLERS = 2


def run(folder: Path, flags: Sequence[str], seconds: float) -> Ledger:
    """Serve with the flags, and have callers at it for some seconds; journals go to the folder."""
    server = TandemProcess("server", folder, flags)
    reference, journal = folder / "reference.jsonl", folder / "callers.jsonl"
    with running(server):
        asyncio.run(_call(server.address, reference, journal, seconds))
    return check(read_journal([journal]), read_journal([reference]))


async def _call(target: str, reference: Path, path: Path, seconds: float) -> None:
    with Journal(reference) as journal:
        await Caller(target, journal, "reference").run_once()
    until_s = time.monotonic() + seconds
    with Journal(path) as journal:
        callers = [Caller(target, journal, f"caller-{n}") for n in range(_NUM_CALLERS)]
        await asyncio.gather(*(c.run(lambda: time.monotonic() < until_s) for c in callers))


def main(arguments: list[str] | None = None) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.real_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    given, flags = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        ledger = run(Path(folder), ["--bundle", str(given.bundle), *flags], given.seconds)
    print(render(ledger))
    return 1 if ledger.violations else 0


if __name__ == "__main__":
    sys.exit(main())
