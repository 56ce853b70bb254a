from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import BundleError
from bundle.hashing import hash_file
from bundle.manifest import load_manifest
from bundle.verify import list_entries, verify_bundle

Edit = Callable[[Callable[[dict[str, Any]], object]], None]
GRAPH, WEIGHTS = "onnx/int4/model.onnx", "student/model.safetensors"


def write(name: str, text: str = "") -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_text(text)


def link(target: str) -> Callable[[Path], None]:
    """Return what replaces the int4 graph by a link."""

    def replace(bundle: Path) -> None:
        (bundle / GRAPH).unlink()
        (bundle / GRAPH).symlink_to(target)

    return replace


def link_out(name: str) -> Callable[[Path], None]:
    """Return what moves a file or folder beside the bundle, and leaves a link to it."""

    def move(bundle: Path) -> None:
        outside = bundle.parent / "outside"
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)

    return move


def test_intact_bundle_is_verified(bundle: Path) -> None:
    assert verify_bundle(bundle) == load_manifest(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("onnx/int8/model.onnx", "int8 grapi"), "int8/model.onnx has sha256 .* says"),
        (write(WEIGHTS, "wei"), "model.safetensors has 3 bytes, manifest.json says 7"),
        (lambda bundle: (bundle / "student/config.json").unlink(), "config.json is missing"),
        (write("onnx/int8/extra.json", "{}"), "extra.json is not listed"),
        (write(".hidden"), ".hidden is not listed"),
        (link_out(WEIGHTS), "model.safetensors leads out of"),
        (link_out("onnx/int8"), "leads out of|is not listed"),
        (link_out("manifest.json"), "manifest.json is not a plain file"),
        (link("../int8/model.onnx"), "int4/model.onnx is not a plain file"),
        (link("nowhere"), "int4/model.onnx is not a plain file"),
        (link("model.onnx"), "int4/model.onnx is not a plain file"),
        (
            write("student/x\nserving on 0.0.0.0\x1b[2J"),
            r"x\\nserving on 0.0.0.0\\x1b\[2J' is not listed",
        ),
    ],
)
def test_damaged_bundle_is_refused_with_the_file_named(
    bundle: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.pth", "w.pkl", "modeling.py", "W.PT"])
def test_file_that_could_run_code_is_refused_even_when_listed(
    bundle: Path,
    edit_manifest: Edit,
    name: str,
) -> None:
    path = bundle / "student" / name
    path.write_text("x")
    entry = {"sha256": hash_file(path), "size_bytes": 1}
    edit_manifest(lambda m: m["files"].update({f"student/{name}": entry}))
    with pytest.raises(BundleError, match="could run code when loaded"):
        verify_bundle(bundle)


def test_name_that_the_file_system_cannot_hold_is_refused(
    bundle: Path, edit_manifest: Edit
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
