"""Runs a fuzz target under atheris, which is installed for that alone: `pip install atheris`.

    python -m tests.faults.fuzz_wire --seconds 60
    python -m tests.faults.fuzz_settings --seconds 60
    python -m tests.faults.fuzz_manifest --seconds 60

A target is a module with `check(data)`, which raises where something is wrong, and `seeds()`. The
tests call the same with a few hundred inputs of hypothesis. Exit code 77: something was found, and
the input is in the file that libFuzzer names.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path


def main(target: str) -> int:
    """Fuzz a target from the command line, in a process that traces what it imports."""
    parser = argparse.ArgumentParser(prog=f"python -m {target}")
    parser.add_argument("--seconds", type=int, default=60)
    given = parser.parse_args()
    command = [sys.executable, "-m", __name__, target, str(given.seconds)]
    return subprocess.run(command, check=False).returncode


def fuzz(target: str, seconds: int) -> None:
    """Fuzz for some seconds; does not return."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["serve", "bundle"]):
        module = importlib.import_module(target)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(module.seeds()):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096"]
        atheris.Setup([target, *options, folder], module.check)
        atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]))
