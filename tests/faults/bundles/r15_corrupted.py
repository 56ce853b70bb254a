"""Corrupted bundles (flipped, truncated, missing, swapped, …): all caught before READY.

Each is a copy of an intact bundle with one damage, and goes through the start of `tandem serve` up
to where it would listen; some go through the command itself, whose ready file must not appear.
The intact bundle must be taken, before and after.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bundle.manifest import MANIFEST_NAME
from tests.faults.bundles.damage import Copies, edit_manifest, relist, why_refused
from tests.faults.result import RowResult, Size
from tests.support.export.folders import hash_folder
from tests.support.tiny_bundle import damage_bundle, shared_tiny_bundle

NUM_BUNDLES = {Size.CI: 60, Size.FULL: 240}
NUM_COMMANDS = {Size.CI: 1, Size.FULL: 12}
START_TIMEOUT_S = 120
GRAPH, WEIGHTS = "onnx/fp32/model.onnx", "onnx/fp32/model.onnx.data"

Damage = Callable[[Path, random.Random], None]


def _pick(bundle: Path, rng: random.Random) -> Path:
    """Return one of the files that have bytes, each as often as any other."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    return rng.choice([path for path in files if path.stat().st_size])


# -- files ----------------------------------------------------------------------------------------


def flip_a_bit(bundle: Path, rng: random.Random) -> None:
    _flip(_pick(bundle, rng), rng)


def flip_a_bit_of_the_manifest(bundle: Path, rng: random.Random) -> None:
    _flip(bundle / MANIFEST_NAME, rng)


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_a_page(bundle: Path, rng: random.Random) -> None:
    path = _pick(bundle, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), 4096)
    page = data[start : start + 4096]
    data[start : start + len(page)] = bytes(len(page)) if any(page) else b"\1" * len(page)
    path.write_bytes(data)


def truncate(bundle: Path, rng: random.Random) -> None:
    path = _pick(bundle, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(bundle: Path, rng: random.Random) -> None:
    with _pick(bundle, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 100)))


def remove(bundle: Path, rng: random.Random) -> None:
    _pick(bundle, rng).unlink()


def remove_a_folder(bundle: Path, rng: random.Random) -> None:
    shutil.rmtree(bundle / rng.choice(["student", "onnx", "onnx/fp32"]))


def swap_two_files(bundle: Path, rng: random.Random) -> None:
    while True:
        one, two = _pick(bundle, rng), _pick(bundle, rng)
        if one.read_bytes() != two.read_bytes():
            break
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def rename(bundle: Path, rng: random.Random) -> None:
    path = _pick(bundle, rng)
    path.rename(path.with_name(path.name + rng.choice([" ", "~", ".bak", "_"])))


def add_a_file(bundle: Path, rng: random.Random) -> None:
    folder = _pick(bundle, rng).parent
    name = rng.choice([".hidden", "extra.json", "model.onnx.data.1", "pytorch_model.bin", "\udcff"])
    (folder / name).write_bytes(rng.randbytes(rng.choice([0, 10])))


# -- the manifest, sealed again -------------------------------------------------------------------


def say_another_hash(bundle: Path, rng: random.Random) -> None:
    def change(raw: dict[str, Any]) -> None:
        entry = raw["files"][rng.choice(sorted(raw["files"]))]
        place = rng.randrange(64)
        digit = rng.choice([d for d in "0123456789abcdef" if d != entry["sha256"][place]])
        entry["sha256"] = entry["sha256"][:place] + digit + entry["sha256"][place + 1 :]

    edit_manifest(bundle, change)


def say_another_size(bundle: Path, rng: random.Random) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["files"][rng.choice(sorted(raw["files"]))]["size_bytes"] += rng.choice([-1, 1, 2**40])

    edit_manifest(bundle, change)


def list_one_less(bundle: Path, rng: random.Random) -> None:
    edit_manifest(bundle, lambda raw: raw["files"].pop(rng.choice(sorted(raw["files"]))))


def list_one_more(bundle: Path, rng: random.Random) -> None:
    entry = {"sha256": f"{rng.getrandbits(256):064x}", "size_bytes": rng.randrange(100)}
    edit_manifest(bundle, lambda raw: raw["files"].update({f"onnx/fp32/{rng.random()}": entry}))


def drop_a_field(bundle: Path, rng: random.Random) -> None:
    edit_manifest(bundle, lambda raw: raw.pop(rng.choice(sorted(raw))))


def put_another_type(bundle: Path, rng: random.Random) -> None:
    def change(raw: dict[str, Any]) -> None:
        names = [name for name in raw if name not in ("schema_version",)]
        raw[rng.choice(sorted(names))] = rng.choice([None, 3, "x", [1], {"x": {}}, True])

    edit_manifest(bundle, change)


def fail_its_gate(bundle: Path, rng: random.Random) -> None:
    del rng
    edit_manifest(bundle, lambda raw: raw["variants"]["fp32"]["gates"][0].update(passed=False))


def truncate_the_manifest(bundle: Path, rng: random.Random) -> None:
    path = bundle / MANIFEST_NAME
    os.truncate(path, rng.randrange(path.stat().st_size))


def replace_the_manifest(bundle: Path, rng: random.Random) -> None:
    texts = [b"", b"[]", b"null", b"[" * 100_000, rng.randbytes(1000), b"\0" * 3000]
    (bundle / MANIFEST_NAME).write_bytes(rng.choice(texts))


# -- what no longer fits together, under hashes that are right ------------------------------------


def cut_the_weights(bundle: Path, rng: random.Random) -> None:
    path = bundle / WEIGHTS
    os.truncate(path, rng.randrange(path.stat().st_size))
    relist(bundle, WEIGHTS)


def put_no_graph(bundle: Path, rng: random.Random) -> None:
    (bundle / GRAPH).write_bytes(rng.choice([b"", b"{}", rng.randbytes(1000)]))
    relist(bundle, GRAPH)


def put_no_model(bundle: Path, rng: random.Random) -> None:
    """Break a file that the model cannot be loaded without."""
    name = rng.choice(["student/tokenizer.json", "onnx/fp32/config.json"])
    (bundle / name).write_bytes(rng.choice([b"", b"[", b"{}", b"[]", b"\xff"]))
    relist(bundle, name)


def put_no_eos(bundle: Path, rng: random.Random) -> None:
    name = "student/generation_config.json"
    value = rng.choice(["2", [], [[2]], -1, 2.5, True])
    (bundle / name).write_text(json.dumps({"eos_token_id": value}))
    relist(bundle, name)


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit, flip_a_bit_of_the_manifest, zero_a_page, truncate, append, remove, remove_a_folder,
    swap_two_files, rename, add_a_file,
    say_another_hash, say_another_size, list_one_less, list_one_more, drop_a_field,
    put_another_type, fail_its_gate, truncate_the_manifest, replace_the_manifest,
    cut_the_weights, put_no_graph, put_no_model, put_no_eos,
)  # fmt: skip


class Others:
    """Damages with what belongs to another bundle of the same names and sizes."""

    def __init__(self, other: Path) -> None:
        self._other = other

    def take_its_file(self, bundle: Path, rng: random.Random) -> None:
        """Replace a file that differs."""
        name = rng.choice([WEIGHTS, MANIFEST_NAME])
        shutil.copyfile(self._other / name, bundle / name)

    def take_its_folder(self, bundle: Path, rng: random.Random) -> None:
        name = rng.choice(["onnx", "onnx/fp32"])
        shutil.rmtree(bundle / name)
        shutil.copytree(self._other / name, bundle / name)


# -- the row --------------------------------------------------------------------------------------


def run(size: Size) -> RowResult:
    """Damage bundles in turns, each kind with another choice every time."""
    result = RowResult("R15", "corrupted bundles")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies = Copies(shared_tiny_bundle(), folder)
        before = hash_folder(copies.source)
        others = Others(damage_bundle(copies.source, folder / "other"))
        _demand_taken(result, copies)
        kinds = (*DAMAGES, others.take_its_file, others.take_its_folder)
        _refuse_all(result, copies, kinds, NUM_BUNDLES[size])
        _refuse_by_command(result, copies, kinds, NUM_COMMANDS[size])
        _demand_taken(result, copies)
        result.demand(hash_folder(copies.source) == before, "the intact bundle was written to")
    return result


def _demand_taken(result: RowResult, copies: Copies) -> None:
    reason = why_refused(copies.make())
    result.demand(reason is None, f"the intact bundle was refused: {reason}")


def _refuse_all(
    result: RowResult, copies: Copies, kinds: tuple[Damage, ...], num_bundles: int
) -> None:
    rng, refused = random.Random(15), Counter[str]()
    for number in range(num_bundles):
        damage = kinds[number % len(kinds)]
        bundle = copies.make()
        damage(bundle, rng)
        reason = why_refused(bundle)
        result.num_requests += 1
        if reason is None:
            result.problems.append(f"served: {damage.__name__} (number {number})")
            continue
        refused[damage.__name__] += 1
        result.demand(
            reason.isprintable() and str(bundle) in reason,
            f"{damage.__name__}: {reason!r} does not say in a line what is wrong with which file",
        )
    result.measured = {"num_refused": refused.total(), "num_kinds": len(refused)}


def _refuse_by_command(
    result: RowResult, copies: Copies, kinds: tuple[Damage, ...], num_commands: int
) -> None:
    rng = random.Random(16)
    for damage in rng.sample(kinds, num_commands):
        bundle = copies.make()
        damage(bundle, rng)
        result.num_requests += 1
        ready_file = copies.folder / "ready.json"
        words = ["--bundle", str(bundle), "--no-teacher", "--ready-file", str(ready_file)]
        ports = ["--port", "0", "--control-port", "0", "--metrics-port", "0"]
        command = [sys.executable, "-m", "tandem", "serve", "--device", "cpu", *words, *ports]
        # It logs what it does before; an error is the last line, and the only one of `tandem:`.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
        line = (done.stderr.splitlines() or [""])[-1]
        result.demand(
            done.returncode == 1 and line.startswith("tandem: ") and "Traceback" not in done.stderr,
            f"{damage.__name__}: exit code {done.returncode}, {line!r}",
        )
        result.demand(not ready_file.exists(), f"{damage.__name__}: READY was said")
