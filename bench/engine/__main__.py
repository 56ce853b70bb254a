"""What Tandem's own engine costs, piece by piece, and whether it keeps to its targets.

    python -m bench.engine --bundle runs/smollm2/bundle --out engine.json --rounds 7
    python -m bench.engine --bundle runs/smollm2/bundle --out soak.json --only soak

Both sides of a ratio are measured in turns within a round; a round that warms up is not counted.
Prompts are pieces of real text, never the same one twice; EOS is ignored.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.engine.checks import decode, host_time, prefill, prefix, samples, scoring, slots
from bench.engine.driver import QUICK, BundleModels, CheckSetting, Prompts, Scale
from bench.engine.measures import Measures, render
from bench.engine.stress import long_context, mixed, soak
from bench.engine.wire import ServerFlags, grpc_streaming, shadow
from bench.peers.machine import describe_machine, watch_foreign_share
from bench.prompts import MIN_PROMPTS, PromptSource, read_text
from bundle.errors import BundleError, UserError
from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME, Manifest, load_manifest
from serve.app.config import ServeConfig
from serve.app.find_teacher import find_teacher
from serve.cpus import count_cpus

PACKAGES = ("torch", "transformers", "onnxruntime", "grpcio", "numpy")
IN_PROCESS: Mapping[str, Callable[[CheckSetting], Measures]] = {
    "host_time": host_time,
    "decode": decode,
    "prefill": prefill,
    "slots": slots,
    "samples": samples,
    "scoring": scoring,
    "prefix": prefix,
    "long_context": long_context,
    "mixed": mixed,
    "soak": soak,
}
ON_THE_WIRE: Mapping[str, Callable[[CheckSetting, ServerFlags], Measures]] = {
    "grpc": grpc_streaming,
    "shadow": shadow,
}
NAMES = (*IN_PROCESS, *ON_THE_WIRE)


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    try:
        print(render(run(options)))
    except UserError as error:
        sys.exit(str(error))


def run(options: argparse.Namespace) -> dict[str, Measures]:
    """Run the checks that are asked for; `options.out` is written anew after each of them.

    Raises:
        UserError: unknown names, or a bundle without the variant or without its teacher.
    """
    names = choose(options.only)
    manifest = load_manifest(options.bundle)
    variant = options.variant or manifest.default_variant
    if variant not in manifest.variants:
        raise BundleError(f"variant {variant!r} is none of {', '.join(sorted(manifest.variants))}")
    setting, flags = make_setting(options, manifest, variant)
    document = _document(options, variant, setting.scale)
    checks: dict[str, Measures] = {}
    for name in names:
        _progress(f"{name} …")
        started_s = time.perf_counter()
        with watch_foreign_share(_own_cpu_s) as foreign:
            in_process = name in IN_PROCESS
            checks[name] = (
                IN_PROCESS[name](setting) if in_process else ON_THE_WIRE[name](setting, flags)
            )
        checks[name].add("cores' time taken by other processes", "share", foreign.share)
        _progress(f"{name}: {time.perf_counter() - started_s:.0f} s")
        write(options.out, document, checks)
    return checks


def choose(only: Sequence[str]) -> list[str]:
    """Return the names of the checks to run, in their order; UserError for an unknown one."""
    unknown = set(only) - set(NAMES)
    if unknown:
        raise UserError(f"--only {','.join(sorted(unknown))}: choose from {','.join(NAMES)}")
    return [name for name in NAMES if not only or name in only]


def make_setting(
    options: argparse.Namespace, manifest: Manifest, variant: str
) -> tuple[CheckSetting, ServerFlags]:
    """Return what the checks work with; UserError where there is no teacher to measure."""
    config = ServeConfig(bundle=options.bundle, teacher=options.teacher)
    teacher = find_teacher(config, manifest.teacher)
    if teacher is None:
        raise UserError("the bundle's teacher is not where it was; give --teacher")
    scale = QUICK if options.quick else Scale()
    if options.rounds is not None:
        scale = replace(scale, num_rounds=options.rounds)
    num_threads = count_cpus()
    models = BundleModels(options.bundle / "onnx" / variant, teacher, options.device, num_threads)
    prompts = Prompts(_source(options.bundle, scale.long_prompt_tokens, options.seed))
    common = ("--variant", variant, "--device", options.device)
    flags = ServerFlags(options.bundle, common, ("--teacher", str(teacher)))
    return CheckSetting(models, prompts, scale, num_threads, options.seed), flags


def _source(bundle: Path, max_tokens: int, seed: int) -> PromptSource:
    """Return prompts out of the held-out text, which is read again where it is too short."""
    text = read_text(bundle)
    num_times = math.ceil((max_tokens + MIN_PROMPTS) / len(text))
    return PromptSource.of(text * num_times, max_tokens, seed)


def _document(options: argparse.Namespace, variant: str, scale: Scale) -> dict[str, Any]:
    config = {
        "manifest_sha256": hash_file(options.bundle / MANIFEST_NAME),
        "variant": variant,
        "device": options.device,
        "seed": options.seed,
        "scale": asdict(scale),
    }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"machine": {**describe_machine(), "versions": versions}, "config": config}


def _own_cpu_s() -> float:
    """Return the CPU time of this process and of the servers that it has stopped."""
    return sum(os.times()[:4])


def write(path: Path, document: Mapping[str, Any], checks: Mapping[str, Measures]) -> None:
    """Write everything so far, in one step."""
    results = {
        check: {name: measure.to_json() for name, measure in measures.by_name.items()}
        for check, measures in checks.items()
    }
    partial_path = path.with_name(path.name + ".part")
    partial_path.write_text(json.dumps({**document, "checks": results}, indent=1) + "\n")
    partial_path.replace(path)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--teacher", type=Path, help="by default the bundle's own")
    parser.add_argument("--rounds", type=int, help=f"by default {Scale().num_rounds}")
    parser.add_argument("--only", type=_names, default=[], help=f"some of {','.join(NAMES)}")
    parser.add_argument("--variant", help="by default the bundle's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small round of everything")
    return parser


if __name__ == "__main__":
    main()
