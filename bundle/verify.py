"""Whether a bundle on disk is exactly what its manifest says.

Checked: schema, every file's size and hash, no file that is not listed, nothing that leaves the
folder, no file that could carry code. Opening the graphs is left to `export` and `serve`.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from bundle.errors import BundleError
from bundle.hashing import hash_file, list_files
from bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, load_manifest

# Pickles and Python sources run code when they are loaded.
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"})


def verify_bundle(bundle: Path) -> Manifest:
    """Return the manifest of an intact bundle; BundleError names the first file that differs."""
    manifest = load_manifest(bundle)
    check_safe(bundle, MANIFEST_NAME)
    found = set(list_files(bundle)) - {MANIFEST_NAME}
    for name in sorted(found | set(manifest.files)):
        if name not in manifest.files:
            raise BundleError(f"{bundle / name} is not listed in {MANIFEST_NAME}")
        _verify_file(bundle, name, manifest.files[name])
    return manifest


def list_entries(bundle: Path) -> dict[str, FileEntry]:
    """Return what `Manifest.files` must hold for the files that lie in the folder now."""
    entries = {}
    for name in list_files(bundle):
        if name == MANIFEST_NAME:
            continue
        check_safe(bundle, name)
        path = bundle / name
        entries[name] = FileEntry(sha256=hash_file(path), size_bytes=path.stat().st_size)
    return entries


def check_safe(folder: Path, name: str) -> None:
    """Refuse a file that leaves the folder, is not plain, or could run code when it is loaded."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} leads out of {folder}")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is not a plain file: copy the file itself into the bundle")
    if PurePosixPath(name).suffix.lower() in UNSAFE_SUFFIXES:
        raise BundleError(f"{path} could run code when loaded: keep weights as .safetensors")
    if path.suffix == ".json" and "config" in path.name and _has_key(path, "auto_map"):
        raise BundleError(f"{path} has 'auto_map', which runs code from the model's folder")


def _verify_file(bundle: Path, name: str, entry: FileEntry) -> None:
    path = bundle / name
    if not path.is_symlink() and not path.exists():
        raise BundleError(f"{path} is missing")
    check_safe(bundle, name)
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise BundleError(f"{path} has {size_bytes} bytes, {MANIFEST_NAME} says {entry.size_bytes}")
    sha256 = hash_file(path)
    if sha256 != entry.sha256:
        raise BundleError(f"{path} has sha256 {sha256}, {MANIFEST_NAME} says {entry.sha256}")


def _has_key(path: Path, key: str) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from None
    return isinstance(config, dict) and key in config
