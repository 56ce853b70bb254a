"""What a check found, as a line of the table that scripts/check_k8s prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line: `check` of `subject`; `problem` is empty when it passed, and `note` says how."""

    check: str
    subject: str
    problem: str = ""
    note: str = ""


class KubeToolError(Exception):
    """A tool is missing, or did not do what it is for; says which and why."""


def run(
    command: Sequence[str | Path], environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool in the repository's root; its exit code is the caller's to judge.

    Raises:
        KubeToolError: it is not there.
    """
    try:
        return subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        raise KubeToolError(f"{command[0]} is not there") from None


def tool(name: str) -> Path:
    """Return a program of the tools' environment, which is the one that runs this."""
    return Path(sys.prefix) / "bin" / name
