"""The disk is full at many points of an export: the old bundle stays, and the error names the path.

From the begin of a stage on the disk has less room than the stage needs: none, or some, in turns.
The export fails and is started again. After every failure the bundle from before must be as it was;
in the end, with room enough, the new one must be whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from bundle.errors import BundleError, UserError
from bundle.verify import verify_bundle
from export.run.files import DiskError
from tests.faults.export.export_child import (
    BUNDLE,
    DISTILL,
    Export,
    finish,
    make_export,
    run_export,
    start,
)
from tests.faults.export.small_disk import SmallDisk
from tests.faults.result import RowResult, Size
from tests.support.export.folders import hash_folder
from tests.support.tiny_bundle import shared_tiny_bundle

ROOM_BYTES = 1 << 30
RUN = ""  # from the start of the command on: finished stages do not begin again


@dataclass(frozen=True, slots=True)
class Point:
    """How much room is left from the begin of a stage on."""

    stage: str
    room_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """At which points the disk is full, and with which stage the export ends."""

    until: str
    points: tuple[Point, ...]


def _plan(until: str, rooms_kib: dict[str, tuple[int, ...]]) -> Plan:
    points = [Point(stage, kib << 10) for stage, rooms in rooms_kib.items() for kib in rooms]
    return Plan(until, tuple(points))


# Each is less than what the stage writes.
PLANS = {
    Size.CI: _plan(DISTILL, {"sample": (0,), DISTILL: (300,)}),
    Size.FULL: _plan(
        BUNDLE,
        {
            "sample": (0, 8),
            "accept": (0,),
            "prune": (0, 200),
            DISTILL: (0, 300, 1000, 1600),
            "onnx-fp32": (0, 200, 600),
            "onnx-int8": (0, 200),
            "evaluate": (0,),
            RUN: (0, 64, 300, 600, 900),
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an export ended at a point: as what kind of error, with which text."""

    stage: str
    room_bytes: int
    kind: str
    text: str
    is_old_bundle_intact: bool


def run(size: Size) -> RowResult:
    """Fill the disk in a process with a disk of its own, and judge what it found."""
    result = RowResult("R17", "disk full during an export")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.json"
        old = folder / "old"
        shutil.copytree(shared_tiny_bundle(), old)
        code = finish(start(fill_disk, folder, old, report, PLANS[size]))
        if code != 0:
            result.problems.append(f"the export's process ended with {code}: {_read(report)}")
            return result
        found = json.loads(report.read_text(encoding="utf-8"))
    attempts = [Attempt(**attempt) for attempt in found["attempts"]]
    result.num_requests = len(attempts)
    result.measured = {
        "num_points": len(attempts),
        "num_places": len({attempt.text.partition(" cannot be")[0] for attempt in attempts}),
    }
    _judge(result, attempts, found["last_problem"])
    return result


def _read(report: Path) -> str:
    return report.read_text(encoding="utf-8") if report.exists() else "it left no report"


def _judge(result: RowResult, attempts: list[Attempt], last_problem: str) -> None:
    for attempt in attempts:
        where = f"{attempt.stage or 'start'} with {attempt.room_bytes} bytes"
        named = f"{where}: {attempt.kind} {attempt.text[:300]!r}"
        result.demand(attempt.kind != "", f"{where}: it ended well")
        is_clear = "/disk/run" in attempt.text and "No space left on device" in attempt.text
        result.demand(attempt.kind in ("", DiskError.__name__) and is_clear, named)
        if attempt.kind and not attempt.is_old_bundle_intact:
            result.num_lost += 1
            result.problems.append(f"the old bundle is gone, {named}")
    result.demand(last_problem == "", f"with room enough: {last_problem}")


# -- in a process of its own ----------------------------------------------------------------------


def fill_disk(folder: Path, old: Path, report: Path, plan: Plan) -> None:
    """Write `report`: an attempt for each point, and how the last one, with room enough, ended."""
    mounted = folder / "disk"
    mounted.mkdir()
    disk = SmallDisk(mounted)
    export = make_export(folder, mounted / "run", plan.until)
    shutil.copytree(old, export.output_dir / "bundle")
    expected = hash_folder(old)
    attempts = []
    for point in plan.points:
        kind, text = _try(export, disk, point)
        is_intact = hash_folder(export.output_dir / "bundle") == expected
        attempts.append(Attempt(point.stage, point.room_bytes, kind, text, is_intact))
    last_problem = " ".join(_try(export, disk, Point(RUN, ROOM_BYTES))).strip()
    found = {
        "attempts": [asdict(attempt) for attempt in attempts],
        "last_problem": last_problem or _why_not_new(export, expected),
    }
    report.write_text(json.dumps(found), encoding="utf-8")


def _try(export: Export, disk: SmallDisk, point: Point) -> tuple[str, str]:
    """Return the kind and the text of the error that an export ends with; two empty ones: none."""

    def fill(stage: str) -> None:
        if stage == point.stage:
            disk.resize(disk.used_bytes() + point.room_bytes)

    disk.resize(ROOM_BYTES)
    fill(RUN)
    try:
        run_export(export, fill)
    except UserError as error:
        return type(error).__name__, str(error)
    except Exception as error:  # a traceback, for the one who started it
        return f"traceback of {type(error).__name__}", traceback.format_exc()
    return "", ""


def _why_not_new(export: Export, old_sha256: str) -> str:
    """Say what is wrong with the bundle of an export that ended well."""
    bundle = export.output_dir / "bundle"
    try:
        verify_bundle(bundle)
    except BundleError as error:
        return str(error)
    is_old = hash_folder(bundle) == old_sha256
    if is_old != (export.until != BUNDLE):
        return "the bundle is still the old one" if is_old else "the bundle was replaced too early"
    return ""
