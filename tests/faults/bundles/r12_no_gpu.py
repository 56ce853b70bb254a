"""A GPU is asked for and missing: exit code 3 and one line, before any model is read.

`tandem serve --device cuda` where no device is to be seen, whatever is installed. It must not fall
back on the CPU; with `auto` it does, and says so. The bundle's models are such that to read one
would be an error of its own: an end for want of a device came before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.bundles.damage import BACKENDS, Copies, relist, why_refused
from tests.faults.result import RowResult, Size
from tests.support.tiny_bundle import shared_tiny_bundle

EXIT_CODE = 3
MAX_S = 120.0
MODELS = ("onnx/fp32/model.onnx", "student/model.safetensors")
NUM_STARTS = {Size.CI: 1, Size.FULL: 20}
FLAGS: tuple[tuple[str, ...], ...] = (
    (),
    ("--no-teacher",),
    ("--no-teacher", "--student-backend", "torch"),
    ("--teacher-backend", "onnx"),
)
"""Who asks the runtimes in turns: onnxruntime and torch, one of them alone."""


def run(size: Size) -> RowResult:
    """Start servers that must not start."""
    result = RowResult("R12", "GPU asked for and missing")
    with tempfile.TemporaryDirectory() as folder:
        bundle = unloadable_bundle(Path(folder))
        for backend in BACKENDS:
            reason = why_refused(bundle, backend)
            result.demand(
                reason is not None and "model.safetensors cannot be read" in reason,
                f"{backend}: without --device cuda the start says {reason}",
            )
        for number in range(NUM_STARTS[size]):
            flags = FLAGS[number % len(FLAGS)]
            started_s = time.monotonic()
            done = start(bundle, flags)
            result.measured[f"start_s, {number}"] = round(time.monotonic() - started_s, 1)
            result.num_requests += 1
            judge(result, flags, done)
    return result


def unloadable_bundle(folder: Path) -> Path:
    """Return a bundle whose hashes are right and whose models no runtime can read."""
    bundle = Copies(shared_tiny_bundle(), folder).make()
    for name in MODELS:
        (bundle / name).write_bytes(b"no model")
    relist(bundle, *MODELS)
    return bundle


def start(bundle: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `tandem serve` without a GPU, to its end."""
    command = [sys.executable, "-m", "tandem", "serve", "--bundle", str(bundle)]
    ports = ["--port", "0", "--control-port", "0", "--metrics-port", "0"]
    return subprocess.run(
        [*command, "--device", "cuda", *ports, *flags],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=MAX_S,
        check=False,
    )


def judge(result: RowResult, flags: Sequence[str], done: subprocess.CompletedProcess[str]) -> None:
    """Hold the end of a server to the targets."""
    name, lines = " ".join(flags) or "both models", done.stderr.strip().splitlines()
    result.demand(done.returncode == EXIT_CODE, f"{name}: exit code {done.returncode}")
    result.demand(len(lines) == 1, f"{name}: {len(lines)} lines: {done.stderr[-500:]!r}")
    result.demand(not done.stdout, f"{name}: on stdout {done.stdout[:200]!r}")
    says = "--device cuda" in done.stderr and "use cpu or auto" in done.stderr
    result.demand(says, f"{name}: it does not say what to do: {done.stderr[-500:]!r}")
