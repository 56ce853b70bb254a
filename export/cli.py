"""`tandem export`: from a recipe to a bundle, with progress. Exit codes: 0, or 3: a gate failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bundle.verify import verify_bundle
from export.config import load_config

app = typer.Typer(help="Turn a teacher into a verified bundle.", no_args_is_help=True)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.", exists=True, dir_okay=False)],
) -> None:
    """Run every stage of a recipe that is not finished yet, and write the bundle."""
    config = load_config(recipe)
    from export.pipeline import run_export

    run_export(config, ConsoleReporter())


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", exists=True)],
) -> None:
    """Compare every file of a bundle with its manifest."""
    manifest = verify_bundle(bundle)
    typer.echo(f"{bundle}: {len(manifest.files)} files are what the manifest says")


class ConsoleReporter:
    """A live bar on a terminal; elsewhere a line now and then, so that a log shows progress."""

    _LINE_EVERY_S = 10.0

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def say(self, message: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {message}", flush=True)

    def track(self, label: str) -> Callable[[int, int], None]:
        """See `export.pipeline.Reporter`."""
        return self._bar(label) if sys.stdout.isatty() else self._lines(label)

    def _bar(self, label: str) -> Callable[[int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        progress = Progress(
            "          {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        task = progress.add_task(label)

        def show(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.stop()

        return show

    def _lines(self, label: str) -> Callable[[int, int], None]:
        last_s = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last_s
            if done == total or time.monotonic() - last_s >= self._LINE_EVERY_S:
                last_s = time.monotonic()
                self.say(f"  {label}: {done} of {total}")

        return show
