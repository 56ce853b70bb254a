"""Whether a bundle on disk is exactly what its manifest says.

Checked: schema, every file's size and hash, no file that is not listed, nothing that leaves the
folder, no file that could carry code. Opening the graphs is left to `export` and `serve`.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from bundle.errors import BundleError, ModelFolderError, one_line
from bundle.hashing import hash_file, list_files
from bundle.json_files import read_object
from bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, load_manifest
from bundle.model_config import check_stays
from bundle.model_folder import CODE_SUFFIXES, PICKLED_SUFFIXES, ModelFolder, open_model_folder
from bundle.model_weights import INDEX_NAME, read_index

# Pickles and code run when they are loaded.
UNSAFE_SUFFIXES = PICKLED_SUFFIXES | CODE_SUFFIXES


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
    try:
        if path.suffix == ".json" and "config" in path.name:
            check_stays(read_object(path), path)
        if path.name == INDEX_NAME:
            read_index(path)
    except ModelFolderError as error:
        raise BundleError(str(error)) from None


def check_models(bundle: Path, manifest: Manifest) -> ModelFolder:
    """Judge the folders of the student and of every graph; return the student's.

    ModelFolderError where one is not what a model library may read: what the manifest lists need
    not be safe.
    """
    for name in manifest.variants:
        open_model_folder(bundle / "onnx" / name, has_weights=False, has_tokenizer=False)
    return open_model_folder(bundle / "student")


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
