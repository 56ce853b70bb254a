"""All checks of scripts/check_k8s as one table; exit code 1 when a line of it failed."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from scripts.k8s import linters, render, schemas
from scripts.k8s.install import find_kubectl, install_prometheus
from scripts.k8s.results import ROOT, CheckResult, KubeToolError, run

WORK = ROOT / "runs" / "k8s-check"  # checkov passes hidden folders by
MONITORING = ROOT / "k8s" / "monitoring"
CHECK_MONITORING = ROOT / "scripts" / "check_monitoring"


def check_rendering() -> Iterator[CheckResult]:
    """Render everything afresh; the other checks read what lies there then."""
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "rendered").mkdir(parents=True)
    kubectl = find_kubectl()
    for name, folders in render.kustomizations().items():
        yield render.render(kubectl, name, folders, WORK / "rendered")


def check_schemas() -> Iterator[CheckResult]:
    yield from schemas.validate(sorted((WORK / "rendered").glob("*.yaml")))


def check_linters() -> Iterator[CheckResult]:
    yield from linters.lint(WORK / "rendered")


def check_rules() -> Iterator[CheckResult]:
    """Check the rules' files, and run their unit tests."""
    install_prometheus()
    for kind, arguments in (("rules", ("check", "rules")), ("tests", ("test", "rules"))):
        files = sorted((MONITORING / kind).rglob("*.yaml"))
        if not files:
            yield CheckResult(
                f"promtool {arguments[0]}", kind, f"k8s/monitoring/{kind} has no *.yaml"
            )
            continue
        done = run(["promtool", *arguments, *files])
        problem = (done.stdout + done.stderr).strip() if done.returncode else ""
        yield CheckResult(f"promtool {arguments[0]}", kind, problem, f"{len(files)} files")


def check_monitoring() -> Iterator[CheckResult]:
    """Evaluate every expression on a Prometheus that scraped a server.

    That the KL alert reaches a webhook is a test: tests/deploy/test_alert_fires.py.
    """
    done = run([CHECK_MONITORING, "--without-alert"])
    lines = (done.stdout + done.stderr).strip().splitlines()
    problem = "\n".join(lines[-40:]) or "it failed" if done.returncode else ""
    yield CheckResult("check_monitoring", "expressions", problem, lines[-1] if lines else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_k8s", description=__doc__)
    parser.add_argument(
        "--without-monitoring", action="store_true", help="leave scripts/check_monitoring out"
    )
    is_whole = not parser.parse_args().without_monitoring
    checks = [check_rendering, check_schemas, check_linters, check_rules]
    if is_whole:
        checks.append(check_monitoring)
    results = [result for check in checks for result in results_of(check)]
    return show(results)


def results_of(check: Callable[[], Iterator[CheckResult]]) -> list[CheckResult]:
    """Return a check's results; a tool that does not work is one more, which failed."""
    print(f"{check.__name__} ...", end=" ", flush=True)
    started_s = time.monotonic()
    results: list[CheckResult] = []
    try:
        results += check()
    except KubeToolError as error:
        results.append(CheckResult(check.__name__, "tools", str(error)))
    print(f"{time.monotonic() - started_s:.0f} s")
    return results


def show(results: list[CheckResult]) -> int:
    """Print a line per result and the problems in full below them; return the exit code."""
    console = Console(highlight=False, width=120)
    table = Table("check", "what", "result", "")
    for result in results:
        verdict = "[red]FAILED[/]" if result.problem else "[green]passed[/]"
        table.add_row(result.check, result.subject, verdict, result.note)
    console.print(table)
    failed = [result for result in results if result.problem]
    for result in failed:
        console.print(f"\nFAILED: {result.check}, {result.subject}", style="bold")
        console.print(result.problem, markup=False)
    console.print(f"\n{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
