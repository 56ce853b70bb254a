"""A bundle and its teacher where the image's user can read them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

from scripts.image.building import ROOT
from scripts.image.containers import Containers, ToolError, run
from scripts.image.proofs import MEMORY_MIB, Proof

TINY_BUNDLE = Path(__file__).with_name("tiny_bundle.py")
PYTHON = ROOT / ".venv" / "bin" / "python"
USER = 10001


def prove_export(containers: Containers, image: str, folder: Path) -> Proof:
    """Export a tiny bundle to `folder`/run/bundle, its teacher in `folder`/teacher."""
    folder.mkdir()
    os.chown(folder, USER, USER)
    began = time.monotonic()
    program = TINY_BUNDLE.read_text(encoding="utf-8")
    command = containers.hardened(
        "--rm",
        "--no-healthcheck",
        f"--volume={folder}:/work",
        "--entrypoint=python",
        *(image, "-c", program, "/work"),
        memory_mib=MEMORY_MIB,
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    is_kept = done.returncode == 0 and (folder / "run" / "bundle" / "manifest.json").is_file()
    seen = f"a tiny bundle in {time.monotonic() - began:.0f} s"
    return Proof("tandem export", is_kept, seen if is_kept else done.stderr[-500:])


def export_here(folder: Path) -> Path:
    """Return the same bundle, exported by the checkout's environment: a serving image cannot.

    Raises:
        ToolError: there is no such environment, or the export failed.
    """
    if not PYTHON.exists():
        raise ToolError(f"no bundle to serve: give --bundle, or make {PYTHON} by `make check`")
    folder.mkdir()
    run([str(PYTHON), str(TINY_BUNDLE), str(folder)], {"PYTHONPATH": str(ROOT)})
    return folder / "run" / "bundle"


def readable_copies(bundle: Path, scratch: Path) -> tuple[Path, Path | None]:
    """Return a bundle and its teacher, copied to `scratch` if others than root cannot read them."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    local_path = manifest["teacher"]["local_path"]
    teacher = _readable(Path(local_path), scratch / "teacher") if local_path else None
    return _readable(bundle.resolve(), scratch / "bundle"), teacher


def _readable(folder: Path, copy: Path) -> Path:
    if all(path.stat().st_mode & stat.S_IROTH for path in (folder, *folder.rglob("*"))):
        return folder
    shutil.copytree(folder, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy
