"""checkov, trivy and hadolint, and the few findings that are accepted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from scripts.k8s.results import ROOT, CheckResult, KubeToolError, run, tool

HERE = Path(__file__).resolve().parent
MAX_EXCEPTIONS = 3
DOCKERFILE = ROOT / "Dockerfile"


@dataclass(frozen=True, slots=True)
class LinterFinding:
    tool: str
    check: str
    resource: str
    text: str

    def __str__(self) -> str:
        return f"{self.check} {self.resource}: {self.text}"


@dataclass(frozen=True, slots=True)
class AcceptedFindings:
    """Findings of a check about resources that match a pattern, and why they are right."""

    tool: str
    check: str
    resource: str
    reason: str

    def covers(self, finding: LinterFinding) -> bool:
        is_check = (self.tool, self.check) == (finding.tool, finding.check)
        return is_check and fnmatchcase(finding.resource, self.resource)


def read_accepted(path: Path = HERE / "exceptions.yaml") -> tuple[AcceptedFindings, ...]:
    """Return the exceptions.

    Raises:
        KubeToolError: there are too many, or one lacks its reason.
    """
    accepted = tuple(
        AcceptedFindings(**each) for each in yaml.safe_load(path.read_text("utf-8")) or ()
    )
    if len(accepted) > MAX_EXCEPTIONS:
        raise KubeToolError(
            f"{path.name} has {len(accepted)} exceptions; {MAX_EXCEPTIONS} are allowed"
        )
    if unexplained := [each.check for each in accepted if not each.reason.strip()]:
        raise KubeToolError(f"{path.name} gives no reason for {', '.join(unexplained)}")
    return accepted


def lint(rendered: Path) -> Iterator[CheckResult]:
    """Yield a result per linter, and one for the exceptions."""
    accepted = read_accepted()
    found: list[LinterFinding] = []
    yield _judge("checkov", "rendered objects", checkov(rendered, "kubernetes"), accepted, found)
    yield _judge("checkov", "Dockerfile", checkov(DOCKERFILE, "dockerfile"), accepted, found)
    yield _judge("trivy config", "rendered objects", trivy(rendered), accepted, found)
    yield _judge("trivy config", "Dockerfile", trivy(DOCKERFILE), accepted, found)
    hadolint = run([tool("hadolint"), DOCKERFILE])
    yield CheckResult("hadolint", "Dockerfile", hadolint.stdout.strip() or hadolint.stderr.strip())
    yield judge_accepted(accepted, found)


def _judge(
    check: str,
    subject: str,
    outcome: tuple[int, list[LinterFinding]],
    accepted: tuple[AcceptedFindings, ...],
    found: list[LinterFinding],
) -> CheckResult:
    """Return what is not accepted as the problem, and add all to `found`."""
    num_passed, findings = outcome
    found += findings
    problems = unexplained(findings, accepted)
    note = f"{num_passed} passed, {len(findings) - len(problems)} explained"
    text = "\n".join(map(str, problems)) if num_passed else "it checked nothing"
    return CheckResult(check, subject, text, note)


def unexplained(
    findings: Iterable[LinterFinding], accepted: Iterable[AcceptedFindings]
) -> list[LinterFinding]:
    """Return the findings that no exception covers."""
    allowed = tuple(accepted)
    return [each for each in findings if not any(one.covers(each) for one in allowed)]


def judge_accepted(
    accepted: Iterable[AcceptedFindings], found: Iterable[LinterFinding]
) -> CheckResult:
    """Say that every exception is still needed."""
    findings, allowed = tuple(found), tuple(accepted)
    stale = [each.check for each in allowed if not any(each.covers(one) for one in findings)]
    problem = f"no finding needs {', '.join(stale)} any more" if stale else ""
    return CheckResult(
        "exceptions", "scripts/k8s/exceptions.yaml", problem, f"{len(allowed)} in use"
    )


def checkov(target: Path, framework: str) -> tuple[int, list[LinterFinding]]:
    """Return how many checks passed, and the findings. KubeToolError: it does not work."""
    where = "-d" if target.is_dir() else "-f"
    done = run(
        [tool("checkov"), where, target, "--framework", framework, "--skip-download", "-o", "json"]
    )
    report = parse_report("checkov", done.stdout, done.stderr)
    if isinstance(report, list) or "results" not in report:
        raise KubeToolError(f"checkov found nothing to check in {target}")
    if errors := report["results"]["parsing_errors"]:
        raise KubeToolError(f"checkov cannot parse {', '.join(errors)}")
    findings = [
        LinterFinding("checkov", each["check_id"], _place(each), each["check_name"])
        for each in report["results"]["failed_checks"]
    ]
    return report["summary"]["passed"], findings


def _place(failed: dict[str, Any]) -> str:
    return f"{Path(failed['file_path']).name} {failed['resource']}"


def trivy(target: Path) -> tuple[int, list[LinterFinding]]:
    """Do as `checkov`; the checks are those inside the program, nothing is downloaded."""
    done = run(
        [
            *(tool("trivy"), "config", "--quiet", "--format=json", "--skip-check-update"),
            *("--skip-version-check", "--disable-telemetry"),
            *(f"--config-data={HERE / 'trivy-data'}", "--ignorefile=", target),
        ]
    )
    report = parse_report("trivy", done.stdout, done.stderr)
    findings, num_passed = [], 0
    for result in report.get("Results", ()):
        num_passed += result["MisconfSummary"]["Successes"]
        for each in result.get("Misconfigurations", ()):
            if each["Status"] == "FAIL":
                findings.append(
                    LinterFinding("trivy", each["ID"], result["Target"], each["Message"])
                )
    return num_passed, findings


def parse_report(name: str, stdout: str, stderr: str) -> Any:
    try:
        return json.loads(stdout)
    except ValueError:
        reason = stderr.strip().splitlines()
        raise KubeToolError(
            f"{name} did not work: {reason[-1] if reason else 'no output'}"
        ) from None
