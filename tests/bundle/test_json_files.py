"""JSON and files that are not what they seem."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle.errors import ModelFolderError
from bundle.json_files import MAX_JSON_BYTES, check_plain_file, parse_object, read_object


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1"),
        (b'{"a": 1,\n "b": }', "is not JSON: Expecting value: line 2 column 7"),
        (b"[]", "holds no JSON object"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"b": [{"a": 1, "a": 2}]}', "the key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON: "),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "is nested too deeply: more than 64 levels"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_json_that_others_read_differently_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(data)


def test_plain_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, 2.5, null, "é"], "b": {"c": 1e30}}')
    assert read_object(tmp_path / "x.json") == {"a": [1, 2.5, None, "é"], "b": {"c": 1e30}}


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ModelFolderError, match="has more than 16777216 bytes"):
        read_object(tmp_path / "x.json")


def link_out(path: Path) -> None:
    (path.parent.parent / "outside.json").write_text("{}")
    path.symlink_to("../outside.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (os.mkfifo, "is not a plain file"),
        (os.mkdir, "is not a plain file"),
        (link_out, "is a link that leads out of the model's folder"),
        (lambda path: path.symlink_to(path.name), "is not a plain file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link that leads out"),
    ],
)
def test_what_is_no_plain_file_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ModelFolderError, match=f"config.json {message}"):
        check_plain_file(path)


def test_links_of_hugging_faces_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "0123").write_text("{}")
    (repo / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/0123")
    check_plain_file(repo / "snapshots" / "abc" / "config.json")
    (repo / "snapshots" / "abc" / "x.json").symlink_to("../../../other/blobs/0123")
    with pytest.raises(ModelFolderError, match="leads out"):
        check_plain_file(repo / "snapshots" / "abc" / "x.json")
