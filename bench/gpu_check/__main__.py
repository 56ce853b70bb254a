"""Every check that needs a GPU, in one run: `python -m bench.gpu_check --random 1b --out FILE`.

Nothing is fetched: `--random` makes a Llama with random weights, `--bundle` takes a bundle's
student. The graphs are exported on the spot, in float16 and bfloat16. Each check returns what it
measured; one that fails leaves its error in the JSON, and the others go on.

Exit status: 0, 1 when a check failed, 3 without CUDA. `--device cpu` runs the checks that make
sense there, in tiny numbers, so that a test covers this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import onnxruntime as ort
import torch
import transformers

from bench.gpu_check.machine import (
    DTYPES,
    FULL,
    SHAPES,
    TINY,
    Bench,
    CheckFailedError,
    CheckSkippedError,
    Result,
    count_parameters,
    export_graphs,
    freed,
    make_random_model,
)
from bench.gpu_check.parity import cuda_graphs_onnx, cuda_graphs_torch, parity
from bench.gpu_check.placement import float32_is_refused, placement
from bench.gpu_check.speed import (
    copy_bandwidth,
    decode,
    decode_static_transformers,
    prefill,
    side_by_side,
)

logger = logging.getLogger(__name__)

NO_CUDA = 3

Check = Callable[[Bench], Result]


def environment(bench: Bench) -> Result:
    """Name the device and the versions of what runs on it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(bench.device) if bench.on_cuda else platform.machine(),
        "driver": _driver_version() if bench.on_cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "transformers": transformers.__version__,
        "sizes": asdict(bench.sizes),
        "num_parameters": count_parameters(bench.student),
    }


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.split()[0]


CHECKS: dict[str, Check] = {
    "environment": environment,
    "copy_bandwidth": copy_bandwidth,
    **{f"placement_{dtype}": partial(placement, dtype=dtype) for dtype in DTYPES},
    "float32_is_refused": float32_is_refused,
    **{
        f"parity_{runtime}_{dtype}": partial(parity, runtime=runtime, dtype=dtype)
        for runtime in ("torch", "onnx")
        for dtype in DTYPES
    },
    "cuda_graphs_onnx": cuda_graphs_onnx,
    "cuda_graphs_torch": cuda_graphs_torch,
    **{f"decode_{runtime}": partial(decode, runtime=runtime) for runtime in ("onnx", "torch")},
    **{f"prefill_{runtime}": partial(prefill, runtime=runtime) for runtime in ("onnx", "torch")},
    "side_by_side": side_by_side,
    "decode_static_transformers": decode_static_transformers,
}


def run_checks(bench: Bench, checks: dict[str, Check], out: Path | None = None) -> Result:
    """Run one check after the other; write what there is after each, if there is an `out`."""
    results: Result = {}
    for name, check in checks.items():
        started_s = time.perf_counter()
        with freed(bench):
            results[name] = _run_check(check, bench)
        results[name]["seconds"] = time.perf_counter() - started_s
        logger.info("%s: %s", name, results[name])
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _run_check(check: Check, bench: Bench) -> Result:
    try:
        return {"status": "passed", **check(bench)}
    except CheckSkippedError as error:
        return {"status": f"skipped: {error}"}
    except CheckFailedError as error:
        return {"status": "failed", "error": str(error), **error.found}
    except Exception as error:
        # Whatever it is, it is this check's result, and a GPU's time is short.
        logger.exception("a check failed")
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def make_bench(options: argparse.Namespace, scratch: Path) -> Bench:
    """Return what `options` ask for; what has to be made is made in `scratch`."""
    if options.bundle is None:
        student = make_random_model(options.random, 0, scratch / "student")
        teacher = make_random_model(options.random, 1, scratch / "teacher")
    else:
        student = options.bundle / "student"
        teacher = options.teacher or student
    device = torch.device(options.device)
    sizes = FULL if device.type == "cuda" else TINY
    return Bench(student, teacher, export_graphs(student, scratch / "onnx"), device, sizes)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="a bundle whose student/ is measured")
    source.add_argument("--random", choices=sorted(SHAPES), help="a Llama with random weights")
    parser.add_argument("--teacher", type=Path, help="the model beside the bundle's student")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(CHECKS), help="these checks only")
    parser.add_argument("--out", type=Path, help="where the JSON goes as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --device cpu tries the checks out", file=sys.stderr)
        return NO_CUDA
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    checks = {name: CHECKS[name] for name in CHECKS if name in (options.only or CHECKS)}
    with tempfile.TemporaryDirectory() as scratch:
        results = run_checks(make_bench(options, Path(scratch)), checks, options.out)
    print(json.dumps(results, indent=1))
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
