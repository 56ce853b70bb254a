"""Tandem and its peers on the same weights, prompts and lengths, in one interleaved run.

    python -m bench.peers --bundle runs/smollm2/bundle --out peers.json --rounds 7
    python -m bench.plot peers.json peers.png

Every side is a process of its own that is stopped while another one measures. In each round each
kind of measurement (decode of 1, 8, 16 sequences, prefill of 64 and 512 tokens) goes through all
sides in a shuffled order, so that the two sides of a ratio are measured within a minute. Prompts
are token ids of real text, never the same one twice, greedy, EOS ignored. Decoding time is a run of
64 new tokens less a run of one, behind one run that warms the caches after the side was stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.peers.client import Worker, WorkerFailedError
from bench.peers.environments import (
    ENVIRONMENTS,
    EnvironmentMissingError,
    prepare,
    worker_variables,
)
from bench.peers.kl import mean_kl
from bench.peers.machine import describe_machine
from bench.peers.results import Config, Results, SideRecord, resume
from bench.peers.rounds import measure_round
from bench.peers.sides import FAMILIES, Side, gguf_path, make_sides, reference_side
from bench.peers.table import derived, render
from bench.prompts import PromptSource, read_answers, read_text
from bundle.errors import UserError
from bundle.hashing import hash_file
from bundle.manifest import MANIFEST_NAME, Manifest, load_manifest

BATCHES = (1, 8, 16)
PROMPT_TOKENS = 64
NEW_TOKENS = 64
PREFILL_TOKENS = (64, 512)
KL_TOKENS = 1000


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    try:
        print(render(compare(options)))
    except UserError as error:
        sys.exit(str(error))


def compare(options: argparse.Namespace) -> Results:
    """Measure what is missing in `options.out`, and return all that it holds then.

    Raises:
        UserError: unknown names, or a file to resume that was measured with another setting.
    """
    manifest = load_manifest(options.bundle)
    sides = make_sides(
        options.bundle, manifest, options.variants, options.peers, options.environments
    )
    results = open_results(options)
    options.environments.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        workers = _start_all(sides, manifest, options, results, stack)
        _measure_kl(workers, sides, manifest, options, results)
        source = PromptSource.of(read_text(options.bundle), max(PREFILL_TOKENS), options.seed)
        for round_number in range(options.rounds):
            for _ in measure_round(round_number, workers, source, results):
                results.save(options.out, derived(results))
            _progress(f"round {round_number + 1} of {options.rounds} done")
    return results


def open_results(options: argparse.Namespace) -> Results:
    """Return empty results, or with `--resume` those of the file."""
    config = Config(
        manifest_sha256=hash_file(options.bundle / MANIFEST_NAME),
        batches=BATCHES,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        prefill_tokens=PREFILL_TOKENS,
        seed=options.seed,
    )
    if options.resume and options.out.exists():
        return resume(options.out, config)
    return Results(describe_machine(), config)


# -- workers ------------------------------------------------------------------------------------


def _start_all(
    sides: Sequence[Side],
    manifest: Manifest,
    options: argparse.Namespace,
    results: Results,
    stack: ExitStack,
) -> dict[str, Worker]:
    """Return the sides' loaded workers; those that cannot be had are absent in `results`."""
    workers = {}
    for side in sides:
        record = results.sides.setdefault(side.name, SideRecord(side.weights))
        try:
            workers[side.name] = _start(side, manifest, options, record, stack)
            record.absent = None
        except (EnvironmentMissingError, WorkerFailedError) as error:
            record.absent = f"cannot be had: {error}"
        _progress(f"{side.name}: {record.absent or f'loaded in {record.load_s:.1f} s'}")
    return workers


def _start(
    side: Side,
    manifest: Manifest,
    options: argparse.Namespace,
    record: SideRecord,
    stack: ExitStack,
) -> Worker:
    """Raises EnvironmentMissingError, WorkerFailedError."""
    root = options.environments
    environment = ENVIRONMENTS[side.environment] if side.environment else None
    python = Path(sys.executable) if environment is None else prepare(environment, root)
    if side.name == "llamacpp":
        _prepare_gguf(options.bundle, gguf_path(manifest, root))
    log = root / f"{side.name}.worker.log"
    worker = Worker(python, side.module, log, worker_variables(environment, root))
    stack.callback(worker.close)
    loaded = worker.load(side.options)
    record.versions, record.load_s = loaded["versions"], loaded["load_s"]
    return worker


def _prepare_gguf(bundle: Path, target: Path) -> None:
    from bench.peers.engines.peer_gguf import write_gguf

    if not target.exists():
        partial = target.with_suffix(".part")
        write_gguf(bundle / "student", partial)
        partial.replace(target)


# -- quality ------------------------------------------------------------------------------------


def _measure_kl(
    workers: dict[str, Worker],
    sides: Sequence[Side],
    manifest: Manifest,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Fill in the KL of every side: from the manifest, or measured unless the file has it."""
    for side in sides:
        if side.kl_from == "manifest" and side.variant:
            record = results.sides[side.name]
            record.kl_nats = manifest.variants[side.variant].metrics.get("kl_to_student")
            record.kl_source = "the bundle's manifest"
    missing = [s for s in sides if s.kl_from is None and results.sides[s.name].kl_nats is None]
    missing = [side for side in missing if side.name in workers]
    if missing:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            _compare_logits(missing, workers, manifest, options, results, Path(scratch), stack)
    for side in sides:
        if side.kl_from in results.sides:
            record, same = results.sides[side.name], results.sides[side.kl_from]
            record.kl_nats, record.kl_source = same.kl_nats, f"as {side.kl_from}: same weights"


def _compare_logits(
    sides: Sequence[Side],
    workers: dict[str, Worker],
    manifest: Manifest,
    options: argparse.Namespace,
    results: Results,
    scratch: Path,
    stack: ExitStack,
) -> None:
    reference = reference_side(options.bundle)
    worker = _start(reference, manifest, options, SideRecord(reference.weights), stack)
    chats = read_answers(options.bundle, KL_TOKENS)
    worker.write_logits(chats, scratch / "reference.npy")
    for side in sides:
        path = scratch / f"{side.name}.npy"
        workers[side.name].write_logits(chats, path)
        record = results.sides[side.name]
        record.kl_nats, num_tokens = mean_kl(scratch / "reference.npy", path)
        record.kl_source = f"measured on {num_tokens} tokens of held-out answers"
        path.unlink()
        _progress(f"{side.name}: KL {record.kl_nats:.5f} nats per token")


# -- the command line ---------------------------------------------------------------------------


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", type=_names, default=["int8", "int8-b32", "int4", "fp32"])
    parser.add_argument(
        "--peers", type=_names, default=list(FAMILIES), help=f"some of {','.join(FAMILIES)}"
    )
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with what FILE.json holds")
    return parser


if __name__ == "__main__":
    main()
