"""The image from the Dockerfile: a base made by mmdebstrap, the host's pip settings as a secret."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from scripts.image.containers import Containers, ToolError, run

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/tandem-base:bookworm"
BASE_PACKAGES = "ca-certificates,python3,python3-venv"
PYTORCH = "https://download.pytorch.org/whl/"
TIMEOUT_S = 5
# Of `pip config list` the settings that say where packages come from, or whom to trust there.
SOURCES = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy")


@dataclass(frozen=True, slots=True)
class PipSettings:
    """Where this machine's pip finds packages. It may be nobody's business: never print it."""

    sources: dict[str, str]
    certificates: Path | None

    @property
    def folders(self) -> list[Path]:
        """The folders on this machine that the sources are in; an index has its files beside it."""
        paths = []
        for word in " ".join(self.sources.values()).split():
            url = urlsplit(word)
            if url.scheme == "file":
                paths.append(Path(url.path).parent)
            elif word.startswith("/"):
                paths.append(Path(word))
        return list(dict.fromkeys(path for path in paths if path.is_dir()))

    def text(self) -> str:
        """Return it as a pip.conf."""
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in self.sources.items())


def read_pip_settings() -> PipSettings:
    """Return what `pip config list` says; a variable of the environment wins over a file."""
    lines = run([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    files = [line for line in lines if not line.startswith(":env:")]
    found: dict[str, str] = {}
    for line in [*files, *(line for line in lines if line not in files)]:
        key, _, value = line.partition("=")
        found[key.rpartition(".")[2]] = ast.literal_eval(value)
    certificates = Path(found["cert"]) if "cert" in found else None
    return PipSettings({key: found[key] for key in SOURCES if key in found}, certificates)


def make_base(containers: Containers) -> None:
    """Make Debian bookworm with Python 3.11 and import it, unless it is there already."""
    if containers.has_image(BASE):
        return
    with tempfile.TemporaryDirectory() as scratch:
        archive = str(Path(scratch) / "base.tar")
        run(["mmdebstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", archive])
        containers.podman("import", archive, BASE)


@dataclass(frozen=True, slots=True)
class ImageKind:
    """What an image is built for: serve or export, cpu or gpu."""

    role: str
    device: str

    @property
    def image(self) -> str:
        return f"localhost/tandem:{self.role}-{self.device}"

    @property
    def arguments(self) -> list[str]:
        return [f"DEVICE={self.device}", f"ROLE={self.role}"]


def build(containers: Containers, kind: ImageKind, torch_index: str | None) -> None:
    """Build the Dockerfile's image; its output goes to stderr. ToolError when it fails."""
    if torch_index is None:
        torch_index = "" if not _is_reachable(PYTORCH) else None
    arguments = [f"BASE_IMAGE={BASE}", f"GPU_BASE_IMAGE={BASE}", f"REVISION={_revision()}"]
    arguments += kind.arguments
    if torch_index is not None:
        arguments.append(f"TORCH_INDEX={torch_index}")
    flags = [f"--build-arg={argument}" for argument in arguments]
    # First, from the cache from then on, what the final image begins with: a mount leaves the empty
    # folder that it was mounted on in the layer.
    _bud(containers, "base", [*flags])
    with _pip_mounts(read_pip_settings()) as mounts:
        _bud(containers, "image", [*flags, *mounts, f"--tag={kind.image}"])


def _bud(containers: Containers, stage: str, flags: list[str]) -> None:
    fixed = ["--layers", "--isolation=chroot", "--pull-never", "--format=docker"]
    command = containers.buildah_command("bud", *fixed, f"--target={stage}", *flags, str(ROOT))
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ToolError(f"buildah exits with {done.returncode} for the stage {stage}")


@contextmanager
def _pip_mounts(settings: PipSettings) -> Iterator[list[str]]:
    """Yield the flags that lend a build the host's sources of packages, for its RUNs alone."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(settings.text())
        file.flush()
        flags = [f"--secret=id=pip,src={file.name}"]
        if settings.certificates:
            flags.append(f"--secret=id=ca,src={settings.certificates}")
        yield [*flags, *(f"--volume={folder}:{folder}:ro" for folder in settings.folders)]


def _is_reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return True
    except OSError:
        return False


def _revision() -> str:
    return run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
