"""What the image holds, and what it must not hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.image.building import ImageKind, PipSettings
from scripts.image.containers import Containers
from scripts.image.proofs import Proof

COMPILERS = {"cc", "c++", "gcc", "g++", "clang", "ld", "as", "make", "cmake", "nvcc", "rustc", "go"}
# Beyond this a file is a library or a model, not a text that names where it was downloaded.
MAX_TEXT_BYTES = 1 << 20
# Of training and conversion: an image that serves has none of them.
EXPORT_PACKAGES = {"accelerate", "datasets", "gguf", "matplotlib", "onnx_ir", "optimum"}
PROGRAMS = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "opt/tandem/bin")


def prove_contents(
    containers: Containers, kind: ImageKind, settings: PipSettings
) -> Iterator[Proof]:
    """Yield what is looked for among the files and in the configuration of an image."""
    config = containers.inspect(kind.image)
    with containers.mounted(kind.image) as root:
        files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        inside = [str(path.relative_to(root)) for path in files]
        yield _none("no compiler", compilers(root))
        if kind.role == "serve":
            yield _none("no package of training", export_packages(root))
        yield _none("no cache of pip", [path for path in inside if is_pip_cache(path)])
        yield _none("no lists of apt", [path for path in inside if is_apt_list(path)])
        yield _none("no pip.conf", [path for path in inside if path.endswith("pip.conf")])
        traces = list(host_traces(root, files, config, settings))
        yield _none("nothing of the host's pip", traces)
        leftover = [
            path for path in inside if path.startswith(("src/", "app/", "opt/pip/", "tmp/"))
        ]
        yield _none("nothing of the build", leftover)
    user = config["Config"]["User"]
    yield Proof("user is not root", user == "10001:10001", f"USER {user}")


def _none(name: str, found: list[str]) -> Proof:
    return Proof(name, not found, ", ".join(found[:5]) or "none")


def compilers(root: Path) -> list[str]:
    """Return the programs that compile or link, also with a version or a machine in their name."""
    found = []
    for folder in PROGRAMS:
        for path in sorted((root / folder).glob("*")):
            words = set(path.name.split("-"))
            if words & COMPILERS and not path.name.startswith("update-"):
                found.append(f"{folder}/{path.name}")
    return found


def export_packages(root: Path) -> list[str]:
    """Return which packages of training and conversion the image's Python can import."""
    folders = root.glob("opt/tandem/lib/python3*/site-packages/*")
    return sorted(EXPORT_PACKAGES & {path.name for path in folders})


def is_pip_cache(path: str) -> bool:
    return "/.cache/pip/" in f"/{path}" or "pip-ephem-wheel-cache" in path


def is_apt_list(path: str) -> bool:
    is_index = path.startswith("var/lib/apt/lists/") and not path.endswith("/lock")
    return is_index or (path.startswith("var/cache/apt/") and path.endswith((".deb", ".bin")))


def host_traces(
    root: Path, files: list[Path], config: dict[str, Any], settings: PipSettings
) -> Iterator[str]:
    """Yield where a source of packages of this machine shows: a folder, a text, the history."""
    for folder in settings.folders:
        if (root / folder.relative_to("/")).exists():
            yield f"the folder of a mount: /{folder.relative_to('/')}"
    words = {word for value in settings.sources.values() for word in value.split()}
    if any(word in json.dumps(config) for word in words):
        yield "the image's configuration"
    for path in files:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
            continue
        content = path.read_bytes()
        if any(word.encode() in content for word in words):
            yield str(path.relative_to(root))
