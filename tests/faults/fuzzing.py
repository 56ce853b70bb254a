"""Runs a fuzz target under atheris, which is installed for that alone: `pip install atheris`.

    python -m tests.faults.fuzz_wire --seconds 60 [--corpus DIR]

A target is a module `tests.faults.fuzz_*` with `check(data)`, which raises where something is
wrong, and `seeds()`. The tests call the same with a few hundred inputs. Exit code 77: something was
found, and the input is in the file that libFuzzer names.

What a target reaches (`pip install coverage`): its seeds and what a corpus has, again and without
atheris, or what the tests have:

    coverage run --branch -m tests.faults.fuzz_wire --seconds 0 --corpus DIR
    coverage run --branch -m pytest tests/faults/test_fuzz.py -k fuzz_wire
    coverage report -m --include 'serve/rpc/validation.py,serve/rpc/decoding.py'
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path


def main(target: str) -> int:
    """Fuzz a target from the command line, in a process that traces what it imports."""
    parser = argparse.ArgumentParser(prog=f"python -m {target}")
    parser.add_argument("--seconds", type=int, default=60, help="0: run what is there, once")
    parser.add_argument("--corpus", type=Path, help="folder that keeps the inputs that led on")
    given = parser.parse_args()
    if not given.seconds:
        return replay(target, given.corpus)
    command = [sys.executable, "-m", __name__, target, str(given.seconds)]
    kept = [given.corpus] if given.corpus else []
    return subprocess.run([*command, *kept], check=False).returncode


@functools.cache
def scratch_folder(name: str) -> Path:
    """Return a folder of this process, which is removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def replay(target: str, corpus: Path | None) -> int:
    """Check the seeds and the inputs of a folder."""
    module = importlib.import_module(target)
    found = sorted(corpus.iterdir()) if corpus else []
    inputs = [*module.seeds(), *(path.read_bytes() for path in found)]
    for data in inputs:
        module.check(data)
    print(f"{len(inputs)} inputs")
    return 0


def fuzz(target: str, seconds: int, corpus: Path | None) -> None:
    """Fuzz for some seconds; does not return."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["serve", "bundle", "loadtest"]):
        module = importlib.import_module(target)
    with ExitStack() as stack:
        folder = corpus or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        for number, seed in enumerate(module.seeds()):
            (folder / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096"]
        atheris.Setup([target, *options, str(folder)], module.check)
        atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None)
