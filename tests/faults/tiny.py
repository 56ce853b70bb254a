"""A bundle of a tiny real model, made once a process, and removed at its end."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from bench.proxy.processes import TandemProcess
from scripts.monitoring.tiny_bundle import MAX_MODEL_LEN, make_tiny_bundle


@functools.cache
def tiny_bundle() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder)
    return make_tiny_bundle(folder)


def tiny_student(name: str, folder: Path, *flags: str) -> TandemProcess:
    """Return `tandem serve` of the bundle's student, not started yet."""
    given = ("--bundle", str(tiny_bundle()), "--no-teacher", "--device", "cpu", "--threads", "1")
    return TandemProcess(name, folder, [*given, "--max-model-len", str(MAX_MODEL_LEN), *flags])
