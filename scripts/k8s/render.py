"""Which kustomizations there are, and what kubectl makes of them."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from scripts.k8s.results import ROOT, CheckResult, run

K8S = ROOT / "k8s"
# The linters judge what a user has: objects in a namespace that is not `default`.
NAMESPACE = "tandem"
# Overlays together with components, as docs/kubernetes.md recommends them.
COMBINATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu-image": ("cpu", ("bundle-image",)),
    "cpu-tls": ("cpu", ("tls",)),
    "gpu-image": ("gpu", ("bundle-image",)),
    "split-gpu": ("split", ("gpu",)),
    "split-image": ("split", ("bundle-image",)),
    "split-tls": ("split", ("tls",)),
    "split-keda-gpu-image-tls": ("split-keda", ("gpu", "bundle-image", "tls")),
}


def kustomizations(k8s: Path = K8S) -> dict[str, list[Path]]:
    """Return what is to be rendered, by name: a folder and the components that it is joined with.

    These are the folders that a user applies: those directly below k8s/ and k8s/overlays/, deeper
    ones that no other one includes, and the combinations.
    """
    folders = {
        path.parent: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(k8s.rglob("kustomization.yaml"))
    }
    overlays = {folder: spec for folder, spec in folders.items() if spec["kind"] != "Component"}
    included = {
        (folder / entry).resolve()
        for folder, spec in overlays.items()
        for entry in spec.get("resources", ())
    }
    shown = [f for f in overlays if f.parent in (k8s, k8s / "overlays") or f not in included]
    names = {
        str(f.relative_to(k8s)).removeprefix("overlays/").replace("/", "-"): [f] for f in shown
    }
    return names | {
        name: [k8s / "overlays" / overlay, *(k8s / "components" / c for c in components)]
        for name, (overlay, components) in COMBINATIONS.items()
        if (k8s / "overlays" / overlay) in folders
    }


def render(kubectl: Path, name: str, folders: list[Path], target: Path) -> CheckResult:
    """Write target/NAME.yaml, the objects in a namespace; the result counts them."""
    overlay, *components = folders
    wrapper = target.parent / "kustomizations" / name
    wrapper.mkdir(parents=True, exist_ok=True)
    spec = {
        "namespace": NAMESPACE,
        "resources": [_relative(overlay, wrapper)],
        "components": [_relative(component, wrapper) for component in components],
    }
    (wrapper / "kustomization.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    done = run([kubectl, "kustomize", wrapper])
    if done.returncode or done.stderr.strip():  # a warning is of something deprecated
        return CheckResult("kubectl kustomize", name, done.stderr.strip() or "it failed")
    (target / f"{name}.yaml").write_text(done.stdout, encoding="utf-8")
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    return CheckResult("kubectl kustomize", name, note=f"{len(objects)} objects")


def _relative(folder: Path, start: Path) -> str:
    return os.path.relpath(folder.resolve(), start.resolve())
