"""buildah and podman with a storage of their own, for a machine without a daemon or systemd."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("mmdebstrap", "buildah", "podman", "runc", "ca-certificates")
# What a pod under Kubernetes' restricted profile has.
HARDENING = (
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,noexec,nosuid,nodev,size=64m",
    "--cap-drop=all", "--security-opt=no-new-privileges", "--user=10001:10001",
    "--pids-limit=256",
)  # fmt: skip


class ToolError(Exception):
    """A tool failed; the message has its last words."""


def run(arguments: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command printed; ToolError with the end of its stderr when it fails."""
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (environment or {}),
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise ToolError(f"{' '.join(arguments[:8])} … exits with {done.returncode}:\n{last}")
    return done.stdout


def install_tools() -> None:
    """Install Debian's packages that are missing; ToolError where apt-get cannot."""
    if all(shutil.which(name) for name in PACKAGES[:-1]):
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-q"], quiet)
    run(["apt-get", "install", "-q", "--yes", "--no-install-recommends", *PACKAGES], quiet)


@dataclass(frozen=True, slots=True)
class Containers:
    """Images and containers below one folder, apart from those that the machine has else."""

    storage: Path

    @property
    def places(self) -> list[str]:
        return [f"--root={self.storage / 'root'}", f"--runroot={self.storage / 'run'}"]

    def podman_command(self, *arguments: str) -> list[str]:
        runtime = ["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none"]
        return ["podman", *self.places, *runtime, *arguments]

    def podman(self, *arguments: str) -> str:
        return run(self.podman_command(*arguments))

    def buildah_command(self, *arguments: str) -> list[str]:
        return ["buildah", *self.places, *arguments]

    def has_image(self, name: str) -> bool:
        return bool(self.podman("images", "--quiet", name))

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what podman knows of a container or an image."""
        found: dict[str, Any] = json.loads(self.podman("inspect", name))[0]
        return found

    def hardened(self, *arguments: str, memory_mib: int, network: str = "none") -> list[str]:
        """Return the command that runs a container as a cluster would: no rights, a hard limit.

        Without the two ulimits podman asks for more than root has in some sandboxes.
        """
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        processes = min(resource.getrlimit(resource.RLIMIT_NPROC)[1], 4096)
        return self.podman_command(
            "run",
            *HARDENING,
            f"--memory={memory_mib}m",
            f"--memory-swap={memory_mib}m",
            f"--network={network}",
            f"--ulimit=nofile={files}:{files}",
            f"--ulimit=nproc={processes}:{processes}",
            "--health-interval=disable",  # a timer of systemd's else; `podman healthcheck` remains
            *arguments,
        )

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Have an image's files below a folder, for the block alone."""
        folder = Path(self.podman("image", "mount", image).strip())
        try:
            yield folder
        finally:
            self.podman("image", "umount", image)

    def leave_nothing_running(self) -> None:
        """Remove all containers and what they have mounted; images stay for the next time."""
        self.podman("rm", "--all", "--force", "--time=0")
        run(self.buildah_command("rm", "--all"))  # of a stage without a step buildah keeps its own
        self.podman("image", "umount", "--all", "--force")
        overlay = self.storage / "root" / "overlay"
        if overlay.is_mount():
            run(["umount", str(overlay)])
