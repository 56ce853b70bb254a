"""Build an image without a Docker daemon, run it hardened, and try what it promises.

    scripts/build_image [cpu] [--bundle runs/demo/bundle] [--out proofs.json]
    scripts/build_image --role export   # the image of the distillation job
    scripts/build_image gpu             # builds; what needs a GPU is not shown
    scripts/build_image --clean         # removes what this script keeps from one time to the next

For Debian, as root. Installs mmdebstrap, buildah, podman and runc where they are missing. The base
is made by mmdebstrap instead of pulled, so that no registry is needed; the rest is the Dockerfile.
Exit codes: 0 all promises kept, 1 one is broken or a tool failed, 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from scripts.image.building import ROOT, ImageKind, build, make_base, read_pip_settings
from scripts.image.bundles import export_here, prove_export, readable_copies
from scripts.image.containers import Containers, ToolError, install_tools
from scripts.image.contents import prove_contents
from scripts.image.proofs import Proof, prove_running, serving

DEMO = "runs/demo/bundle"
STORAGE = Path("/var/tmp/tandem-image")
NO_ROOT = """\
scripts/build_image needs root: it installs packages, makes a base image in a chroot and mounts
overlays. Where there is a Docker daemon or a rootless podman, `docker build .` needs
none of that (docs/container.md)."""


def main() -> int:
    parser = argparse.ArgumentParser("scripts/build_image", description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--role", choices=("serve", "export"), default="serve", help="default: serve"
    )
    parser.add_argument(
        "--bundle", type=Path, help=f"to serve; default: {DEMO}, else a tiny one that is exported"
    )
    parser.add_argument("--torch-index", help="of torch; default: the Dockerfile's, if it answers")
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    parser.add_argument("--storage", type=Path, default=STORAGE, help="of images and layers")
    parser.add_argument("--clean", action="store_true", help="remove the storage, build nothing")
    options = parser.parse_args()
    if options.bundle and not (options.bundle / "manifest.json").is_file():
        parser.error(f"--bundle {options.bundle}: there is no manifest.json")
    if os.geteuid() != 0:
        print(NO_ROOT, file=sys.stderr)
        return 2
    try:
        return clean(options.storage) if options.clean else build_and_prove(options)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1


def clean(storage: Path) -> int:
    if storage.exists():
        Containers(storage).leave_nothing_running()
        shutil.rmtree(storage)
    return 0


def build_and_prove(options: argparse.Namespace) -> int:
    began = time.monotonic()
    say("installing the tools that are missing")
    install_tools()
    containers = Containers(options.storage)
    containers.storage.mkdir(parents=True, exist_ok=True)
    kind = ImageKind(options.role, options.device)
    try:
        say("making the base image")
        make_base(containers)
        say(f"building {kind.image}")
        build(containers, kind, options.torch_index)
        build_s = time.monotonic() - began
        say("trying what it promises")
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch).chmod(0o755)
            proofs = list(announced(prove(containers, kind, options.bundle, Path(scratch))))
        facts = describe(containers, kind.image, build_s, time.monotonic() - began)
    finally:
        containers.leave_nothing_running()
    if options.out:
        report = facts | {"proofs": [asdict(proof) for proof in proofs]}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    broken = [proof.name for proof in proofs if not proof.is_kept]
    print(json.dumps(facts, indent=1))
    print(f"{len(proofs) - len(broken)} of {len(proofs)} kept", *broken, sep="\n  broken: ")
    return 1 if broken else 0


def prove(
    containers: Containers, kind: ImageKind, bundle: Path | None, scratch: Path
) -> Iterator[Proof]:
    """Yield every proof, the one that ends the server last."""
    yield from prove_contents(containers, kind, read_pip_settings())
    if bundle is None and (ROOT / DEMO / "manifest.json").is_file():
        bundle = ROOT / DEMO
    tiny = scratch / "tiny"
    if kind.role == "export":
        yield prove_export(containers, kind.image, tiny)
    elif bundle is None:
        bundle = export_here(tiny)
    served: tuple[Path, Path | None] = (tiny / "run" / "bundle", tiny / "teacher")
    if bundle is not None:
        served = readable_copies(bundle, scratch)
    with serving(containers, kind.image, *served) as server:
        yield from prove_running(server)


def say(message: str) -> None:
    print(f"--- {message}", file=sys.stderr, flush=True)


def announced(proofs: Iterator[Proof]) -> Iterator[Proof]:
    """Yield the same, each printed as a line of the table when it is there."""
    for proof in proofs:
        verdict = "ok    " if proof.is_kept else "BROKEN"
        print(f"{verdict}  {proof.name:26} {proof.seen}", flush=True)
        yield proof


def describe(
    containers: Containers, image: str, build_s: float, total_s: float
) -> dict[str, object]:
    """Return what was built, where, and how long it took."""
    found = containers.inspect(image)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "revision": found["Labels"]["org.opencontainers.image.revision"],
        "image_size_mb": round(found["Size"] / 1e6),
        "build_s": round(build_s),
        "total_s": round(total_s),
    }


if __name__ == "__main__":
    sys.exit(main())
