"""A folder's contents as one hash."""

from __future__ import annotations

from pathlib import Path

from bundle.hashing import hash_file, hash_json, list_files


def hash_folder(folder: Path) -> str:
    """Return the hex SHA-256 of a folder's relative file names and their contents."""
    return hash_json({name: hash_file(folder / name) for name in list_files(folder)})
