from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import BundleError
from bundle.hashing import hash_file
from bundle.manifest import load_manifest
from bundle.verify import list_entries, verify_bundle


def flip_byte(bundle: Path) -> None:
    path = bundle / "onnx/int8/model.onnx"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def truncate(bundle: Path) -> None:
    os.truncate(bundle / "student/model.safetensors", 3)


def remove(bundle: Path) -> None:
    (bundle / "student/config.json").unlink()


def add(bundle: Path) -> None:
    (bundle / "onnx/int8/extra.json").write_text("{}")


def add_hidden(bundle: Path) -> None:
    (bundle / ".hidden").write_text("")


def link_out(bundle: Path) -> None:
    path = bundle / "student/model.safetensors"
    outside = bundle.parent / "weights"
    path.rename(outside)
    path.symlink_to(outside)


def link_folder_out(bundle: Path) -> None:
    outside = bundle.parent / "int8"
    (bundle / "onnx/int8").rename(outside)
    (bundle / "onnx/int8").symlink_to(outside)


def link_within(bundle: Path) -> None:
    path = bundle / "onnx/int4/model.onnx"
    path.unlink()
    path.symlink_to(bundle / "onnx/int8/model.onnx")


def dangling_link(bundle: Path) -> None:
    path = bundle / "onnx/int4/model.onnx"
    path.unlink()
    path.symlink_to(bundle / "nowhere")


def link_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle.parent / "manifest.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")


def loop(bundle: Path) -> None:
    path = bundle / "onnx/int4/model.onnx"
    path.unlink()
    path.symlink_to("model.onnx")


def add_with_a_name_of_two_lines(bundle: Path) -> None:
    (bundle / "student/x\nserving on 0.0.0.0\x1b[2J").write_text("")


def test_intact_bundle_is_verified(bundle: Path) -> None:
    assert verify_bundle(bundle) == load_manifest(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "int8/model.onnx has sha256 .* says"),
        (truncate, "model.safetensors has 3 bytes, manifest.json says 7"),
        (remove, "student/config.json is missing"),
        (add, "extra.json is not listed"),
        (add_hidden, ".hidden is not listed"),
        (link_out, "model.safetensors leads out of"),
        (link_folder_out, "leads out of|is not listed"),
        (link_within, "int4/model.onnx is not a plain file"),
        (dangling_link, "int4/model.onnx is not a plain file"),
        (loop, "int4/model.onnx is not a plain file"),
        (add_with_a_name_of_two_lines, r"x\\nserving on 0.0.0.0\\x1b\[2J' is not listed"),
        (link_manifest, "manifest.json is not a plain file"),
    ],
)
def test_damaged_bundle_is_refused_with_the_file_named(
    bundle: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth", "w.pkl", "modeling.py", "W.PT"])
def test_file_that_could_run_code_is_refused_even_when_listed(
    bundle: Path,
    edit_manifest: Callable[[Callable[[dict[str, Any]], object]], None],
    name: str,
) -> None:
    path = bundle / "student" / name
    path.write_text("x")
    entry = {"sha256": hash_file(path), "size_bytes": 1}
    edit_manifest(lambda m: m["files"].update({f"student/{name}": entry}))
    with pytest.raises(BundleError, match="could run code when loaded"):
        verify_bundle(bundle)


def test_name_that_the_file_system_cannot_hold_is_refused(
    bundle: Path, edit_manifest: Callable[[Callable[[dict[str, Any]], object]], None]
) -> None:
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    edit_manifest(lambda m: m["files"].update({"a" * 300: entry}))
    with pytest.raises(BundleError, match="aaa cannot be read: File name too long"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/outside.safetensors", 3])
def test_index_that_names_weights_elsewhere_is_not_packaged(bundle: Path, name: Any) -> None:
    path = bundle / "student/model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(BundleError, match=r"index.json names weights elsewhere: "):
        list_entries(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"auto_map": {"AutoModel": "modeling.X"}}', "has 'auto_map'"),
        ('{"transformers_weights": "../../w.safetensors"}', "which names other weights than"),
        ('{"base_model_name_or_path": "/other"}', "which names another model"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_config_that_could_run_code_is_not_packaged(bundle: Path, text: str, message: str) -> None:
    (bundle / "student/tokenizer_config.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        list_entries(bundle)
