from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bundle.hashing import hash_file, hash_json, list_files


def test_file_hash_is_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1.5}, {"a": "1"}, {"a": [1]}])
def test_different_values_have_different_hashes(other: object) -> None:
    assert hash_json({"a": 1}) != hash_json(other)


def test_value_without_json_spelling_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_json({"temperature": float("nan")})


def test_list_files_gives_relative_names_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").touch()
    (tmp_path / "b").symlink_to("nowhere")
    assert list(list_files(tmp_path)) == ["b", "sub/a"]
