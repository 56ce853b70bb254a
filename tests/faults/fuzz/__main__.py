"""Runs a fuzz target under atheris, which is installed for that alone: `pip install atheris`.

    python -m tests.faults.fuzz wire --seconds 60 [--corpus DIR]

A target is a module of this folder with `check(data)`, which raises where something is wrong, and
`seeds()`. The tests call the same with a few hundred inputs. Exit code 77: something was found, and
the input is in the file that libFuzzer names.

What a target reaches (`pip install coverage`): its seeds and what a corpus has, again and without
atheris, or what the tests have:

    coverage run --branch -m tests.faults.fuzz wire --seconds 0 --corpus DIR
    coverage run --branch -m pytest tests/faults/fuzz -k wire
    coverage report -m --include 'serve/rpc/validation.py,serve/rpc/decoding.py'
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from contextlib import ExitStack
from pathlib import Path

TARGETS = ("wire", "settings", "manifest", "answers", "files", "http")


def replay(target: str, corpus: Path | None) -> None:
    """Check the seeds and the inputs of a folder."""
    module = importlib.import_module(f"tests.faults.fuzz.{target}")
    found = sorted(corpus.iterdir()) if corpus else []
    inputs = [*module.seeds(), *(path.read_bytes() for path in found)]
    for data in inputs:
        module.check(data)
    print(f"{len(inputs)} inputs")


def fuzz(target: str, seconds: int, corpus: Path | None) -> None:
    """Fuzz for some seconds, what the target imports traced; does not return."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["serve", "bundle", "loadtest"]):
        module = importlib.import_module(f"tests.faults.fuzz.{target}")
    with ExitStack() as stack:
        folder = corpus or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        for number, seed in enumerate(module.seeds()):
            (folder / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096"]
        atheris.Setup([target, *options, str(folder)], module.check)
        atheris.Fuzz()


def main() -> None:
    """Fuzz a target from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="0: run what is there, once")
    parser.add_argument("--corpus", type=Path, help="folder that keeps the inputs that led on")
    given = parser.parse_args()
    if given.seconds:
        fuzz(given.target, given.seconds, given.corpus)
    else:
        replay(given.target, given.corpus)


if __name__ == "__main__":
    main()
