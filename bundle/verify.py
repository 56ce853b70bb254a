"""Whether a bundle on disk is exactly what its manifest says.

Checked: schema, every file's size and hash, no file that is not listed, nothing that leaves the
folder, no file that could carry code. Opening the graphs is left to `export` and `serve`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bundle.errors import BundleError, one_line
from bundle.hashing import hash_file, list_files
from bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, load_manifest

# Keys of a configuration with which transformers and PEFT leave the folder.
LEADS_OUT = {
    "auto_map": "runs code from the model's folder",
    "transformers_weights": "names other weights than the folder's",
    "base_model_name_or_path": "names another model",
}
# Pickles and Python sources run code when they are loaded.
_INDEX_SUFFIX = ".safetensors.index.json"
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"})


def verify_bundle(bundle: Path) -> Manifest:
    """Return the manifest of an intact bundle; BundleError names the first file that differs."""
    manifest = load_manifest(bundle)
    found = set(list_files(bundle)) - {MANIFEST_NAME}
    for name in sorted(found | set(manifest.files)):
        if name not in manifest.files:
            raise BundleError(f"{one_line(str(bundle / name))} is not listed in {MANIFEST_NAME}")
        try:
            _verify_file(bundle, name, manifest.files[name])
        except OSError as error:
            raise BundleError(f"{bundle / name} cannot be read: {error.strerror}") from None
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
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise BundleError(f"{path} leads out of {folder}")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is not a plain file: copy the file itself into the bundle")
    if PurePosixPath(name).suffix.lower() in UNSAFE_SUFFIXES:
        raise BundleError(f"{path} could run code when loaded: keep weights as .safetensors")
    if path.suffix == ".json" and "config" in path.name:
        _check_config(path)
    if path.name.endswith(_INDEX_SUFFIX):
        _check_index(path)


def check_indices(folder: Path) -> None:
    """Refuse a model's folder whose index of weights names files elsewhere."""
    for path in sorted(folder.glob(f"*{_INDEX_SUFFIX}")):
        _check_index(path)


def _check_config(path: Path) -> None:
    config = _read_json(path)
    for key in sorted(LEADS_OUT.keys() & config.keys()):
        raise BundleError(f"{path} has {key!r}, which {LEADS_OUT[key]}")


def _check_index(path: Path) -> None:
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict):
        raise BundleError(f"{path} has no weight_map")
    for name in files.values():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise BundleError(f"{path} names weights elsewhere: {name!a}")


def _read_json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object; an empty one for JSON of another kind."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise BundleError(f"{path} is nested too deeply") from None
    return value if isinstance(value, dict) else {}


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
