"""An export SIGKILLed at random points: what is resumed has the same hashes as a run in one go.

A point is a stage and a share of the time that it took without faults, so that stages of
milliseconds are hit as often as those of seconds. Fewer kills end with the student; the full number
goes through all stages to the bundle, a few kills for each run.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bundle.verify import verify_bundle
from tests.faults.export.export_child import (
    BUNDLE,
    DISTILL,
    Export,
    finish,
    kill,
    make_export,
    run_export,
    start,
    wait_for,
)
from tests.faults.result import RowResult, Size

NUM_KILLS = {Size.CI: 2, Size.FULL: 30}
# What is resumed has less to do than it had at first, and may be whole before it is killed.
MAX_RUNS = {Size.CI: 4, Size.FULL: 12}
NUM_KILLS_PER_RUN = {Size.CI: 2, Size.FULL: 5}
UNTIL = {Size.CI: DISTILL, Size.FULL: BUNDLE}
# In the order in which they run, as the log announces them; training is what resumes halfway.
STAGES = {
    Size.CI: (DISTILL,),
    Size.FULL: ("sample", "prune", DISTILL, DISTILL, "onnx-fp32", "onnx-int8", "evaluate", BUNDLE),
}


@dataclass(frozen=True, slots=True)
class Point:
    """A moment of a run: so long after a stage began."""

    stage: str
    delay_s: float


def run(size: Size) -> RowResult:
    """Run once without faults, then kill and resume until each run is whole."""
    result = RowResult("R18", "distillation and export SIGKILLed")
    rng = random.Random(18)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = make_export(folder, folder / "reference", UNTIL[size])
        seconds = run_in_one_go(reference)
        expected = hashes(reference)
        num_runs = 0
        while result.num_requests < NUM_KILLS[size] and num_runs < MAX_RUNS[size]:
            killed = make_export(folder, folder / f"killed-{num_runs}", UNTIL[size])
            points = draw_points(rng, size, seconds)
            result.num_requests += sum(_kill_at(killed, point) for point in points)
            _judge(result, killed, expected)
            num_runs += 1
    result.measured = {"num_killed": result.num_requests, "num_runs": num_runs}
    planned = NUM_KILLS[size]
    result.demand(
        result.num_requests >= planned, f"only {result.num_requests} of {planned} were in time"
    )
    return result


def run_in_one_go(export: Export) -> dict[str, float]:
    """Return how long each stage took, by its name, the packaging as "bundle"."""
    began_s: dict[str, float] = {}
    process = start(run_export, export)
    wait_for(process, lambda: _note_stages(export, began_s))
    assert finish(process) == 0, export.log.read_text()
    marks = [*began_s.items(), ("", time.monotonic())]
    return {name: marks[i + 1][1] - at for i, (name, at) in enumerate(marks[:-1])}


def _note_stages(export: Export, began_s: dict[str, float]) -> bool:
    for line in export.log.read_text(encoding="utf-8").splitlines():
        if line.endswith(" …"):
            began_s.setdefault(line.removesuffix(" …"), time.monotonic())
        if line.startswith("evaluate: "):
            began_s.setdefault(BUNDLE, time.monotonic())
    return False


def draw_points(rng: random.Random, size: Size, seconds: dict[str, float]) -> list[Point]:
    places = sorted(rng.choices(range(len(STAGES[size])), k=NUM_KILLS_PER_RUN[size]))
    stages = [STAGES[size][place] for place in places]
    return [Point(stage, rng.random() * seconds[stage]) for stage in stages]


def _kill_at(export: Export, point: Point) -> bool:
    """Start or resume, and kill at the point; False where the export was whole before."""
    num_before = len(export.log.read_text(encoding="utf-8").splitlines())
    process = start(run_export, export)

    def has_begun() -> bool:
        said = export.log.read_text(encoding="utf-8").splitlines()[num_before:]
        return any(_announces(line, point.stage) for line in said)

    is_running = wait_for(process, has_begun)
    if is_running:
        process.join(point.delay_s)
    is_killed = process.exitcode is None
    kill(process)
    return is_killed


def _announces(line: str, stage: str) -> bool:
    return line.startswith("evaluate: " if stage == BUNDLE else f"{stage} …")


def _judge(result: RowResult, killed: Export, expected: dict[str, str]) -> None:
    if finish(start(run_export, killed)) != 0:
        result.num_lost += 1
        result.problems.append(f"cannot be resumed: {killed.log.read_text()[-500:]}")
        return
    found = hashes(killed)
    wrong = sorted(
        name for name in found.keys() | expected if found.get(name) != expected.get(name)
    )
    result.num_altered += len(wrong)
    result.demand(not wrong, f"{killed.output_dir.name}: other bytes in {', '.join(wrong)}")


def hashes(export: Export) -> dict[str, str]:
    """Return the SHA-256 of student, log of training and graphs, by their names."""
    if export.until == BUNDLE:
        folder = export.output_dir / "bundle"
        verify_bundle(folder)
    else:
        (folder,) = (path.parent for path in export.output_dir.glob(f"work/{DISTILL}-*/stage.json"))
    wanted = ("model.safetensors", "training.jsonl", "model.onnx", "model.onnx.data")
    files = [path for path in folder.rglob("*") if path.name in wanted]
    assert len(files) >= 2, files
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
