"""What is installed, and on what machine: the facts that `tandem doctor` judges."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from tandem.roles import ROOT, read_project

# Either brings the module onnxruntime.
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


@dataclasses.dataclass(frozen=True)
class Environment:
    """What `diagnose` judges. Package names are canonical ("optimum-onnx")."""

    python_version: str
    requires_python: str
    requirements: Mapping[str, tuple[str, ...]]  # by role
    packages: Mapping[str, str]
    dependencies: Mapping[str, tuple[str, ...]]  # what each installed package says it needs
    import_errors: Mapping[str, str]
    stubs_grpcio_version: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    num_cores: int
    memory_bytes: int
    cuda_devices: tuple[str, ...]
    execution_providers: tuple[str, ...]


def gather() -> Environment:
    """Look at this process and this machine; imports torch and onnxruntime if there (seconds)."""
    project = read_project()
    distributions = {
        canonicalize_name(found.name): found for found in metadata.distributions() if found.name
    }
    has_torch, has_onnxruntime = "torch" in distributions, bool(RUNTIMES & distributions.keys())
    devices, torch_error = _cuda_devices() if has_torch else ((), "")
    providers, onnxruntime_error = _execution_providers() if has_onnxruntime else ((), "")
    errors = {"torch": torch_error, "onnxruntime": onnxruntime_error}
    return Environment(
        python_version=platform.python_version(),
        requires_python=project.requires_python,
        requirements=project.requirements,
        packages={name: found.version for name, found in distributions.items()},
        dependencies={
            name: tuple(found.requires or ())
            for name, found in distributions.items()
            if name != "tandem"
        },
        import_errors={name: error for name, error in errors.items() if error},
        stubs_grpcio_version=find_stubs_grpcio_version(),
        cpu_model=cpuinfo("model name") or platform.processor() or platform.machine(),
        cpu_flags=tuple(cpuinfo("flags").split()),
        num_cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cuda_devices=devices,
        execution_providers=providers,
    )


def _cuda_devices() -> tuple[tuple[str, ...], str]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # whatever a broken installation raises is the finding
        return (), _one_line(error)
    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_name(index) for index in range(count)), ""


def _execution_providers() -> tuple[tuple[str, ...], str]:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        return tuple(onnxruntime.get_available_providers()), ""
    except Exception as error:  # both packages in one folder fail in many ways
        return (), _one_line(error)


def _one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def find_stubs_grpcio_version(stubs: Path = ROOT / "protos") -> str:
    """The version of grpcio that the generated stubs need; empty where there are none."""
    pattern = re.compile(r"^GRPC_GENERATED_VERSION = '([^']+)'", re.MULTILINE)
    texts = (path.read_text(encoding="utf-8") for path in stubs.rglob("*_pb2_grpc.py"))
    versions = [match[1] for text in texts if (match := pattern.search(text))]
    return max(versions, key=Version, default="")


def cpuinfo(key: str, path: Path = Path("/proc/cpuinfo")) -> str:
    """The value of a key of Linux' /proc/cpuinfo; empty on other systems."""
    if not path.exists():
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""
