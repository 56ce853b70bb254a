from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bundle.errors import BundleError
from bundle.manifest import (
    MAX_MANIFEST_BYTES,
    Gate,
    StudentInfo,
    Variant,
    load_manifest,
    write_manifest,
)
from bundle.verify import verify_bundle

Edit = Callable[[Callable[[dict[str, Any]], object]], None]


def test_manifest_read_back_equals_what_was_written(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    write_manifest(bundle, manifest)
    assert load_manifest(bundle) == manifest


def test_manifest_is_immutable(bundle: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_manifest(bundle).default_variant = "int4"  # type: ignore[misc]


def test_failed_write_leaves_the_old_manifest_and_no_temporary(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    manifest = load_manifest(bundle)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(bundle, manifest)
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in bundle.glob(".*")] == []


def test_older_manifest_does_not_say_what_the_teachers_files_were(
    bundle: Path, edit_manifest: Edit
) -> None:
    assert load_manifest(bundle).teacher.inputs == {"config.json": "2" * 64}
    edit_manifest(lambda m: m["teacher"].pop("inputs"))
    assert verify_bundle(bundle).teacher.inputs is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version 2, this Tandem reads 1"),
        (lambda m: m.pop("schema_version"), "schema_version None"),
        (lambda m: m.update(comment="hi"), "comment: Extra inputs are not permitted"),
        (lambda m: m["teacher"].update(path="x"), "teacher.path: Extra inputs"),
        (lambda m: m["teacher"]["inputs"].update(x="y"), "teacher.inputs.x: String should match"),
        (lambda m: m.update(default_variant="fp16"), "'fp16' is none of .'int4', 'int8'"),
        (lambda m: m.update(default_variant="int4"), "'int4' has not passed.*kl"),
        (lambda m: m["variants"]["int8"].update(gates=[]), "has not passed its gates: it has none"),
        (lambda m: m["files"].pop("onnx/int8/model.onnx"), "does not list 'onnx/int8/model.onnx'"),
        (lambda m: m["variants"].update({"../x": m["variants"]["int8"]}), "String should match"),
        (lambda m: m.pop("teacher"), "teacher: Field required"),
        (lambda m: m.update(tokenizer_sha256="abc"), "tokenizer_sha256: String should match"),
    ],
)
def test_bad_manifest_is_refused_by_name(
    bundle: Path,
    edit_manifest: Edit,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    edit_manifest(change)
    with pytest.raises(BundleError, match=message):
        load_manifest(bundle)


OUTSIDE = ["/etc/passwd", "../secret", "a/../../b", "a//b", "./a", ".", "", "a\\b", "C:/x", "a/"]
DISGUISED = ["a\0b", "a\nb", "a\x1b[31m", "a\u202eb", "a\u200bb", "cafe\u0301", "\uff0e\uff0e/a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "must be a relative posix path without") for name in OUTSIDE),
        *((name, "must be printable") for name in DISGUISED),
        ("student/CONFIG.json", r"'student/CONFIG.json' differ in case alone"),
    ],
)
def test_manifest_with_a_file_name_that_misleads_is_refused(
    bundle: Path, edit_manifest: Edit, name: str, message: str
) -> None:
    edit_manifest(lambda m: m["files"].update({name: m["files"]["student/config.json"]}))
    with pytest.raises(BundleError, match=message) as caught:
        load_manifest(bundle)
    assert str(caught.value).isprintable()


def without_its_hash(text: str) -> str:
    raw = json.loads(text)
    del raw["sha256"]
    return json.dumps(raw, indent=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "{", "is not JSON"),
        (lambda text: "[]", "schema_version None"),
        (lambda text: "\udcff", "is not JSON"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (
            lambda text: text.replace('": 0.01', '": 0.02'),
            r"changed: its sha256 is \w{64}, it sa",
        ),
        (without_its_hash, "does not end with its own sha256: export the bundle"),
        (lambda text: " " * (MAX_MANIFEST_BYTES + 1), "has more than 16777216 bytes"),
    ],
)
def test_manifest_whose_text_was_changed_is_refused(
    bundle: Path, change: Callable[[str], str], message: str
) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(change(path.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=message):
        load_manifest(bundle)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_manifest_that_is_no_plain_file_is_not_waited_for(
    bundle: Path, make: Callable[[Path], None]
) -> None:
    (bundle / "manifest.json").unlink()
    make(bundle / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest.json is not a plain file"):
        load_manifest(bundle)


def test_manifest_that_cannot_be_read_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(BundleError, match=r"manifest.json cannot be read: Permission denied"):
        load_manifest(bundle)


def test_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("measured", "message"),
    [(None, "'kl' cannot pass without a measured number"), (float("nan"), "finite")],
)
def test_gate_without_a_number_cannot_pass(measured: float | None, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate(name="kl", measured=measured, threshold=0.02, passed=True, unit="nats/token")


def test_student_lists_one_teacher_layer_per_layer() -> None:
    with pytest.raises(ValidationError, match="kept_layers lists 2 layers, num_layers is 3"):
        StudentInfo(num_parameters=1, num_layers=3, kept_layers=(0, 1), dtype="float32")


def test_variant_without_gates_has_not_passed(bundle: Path) -> None:
    variant = load_manifest(bundle).variants["int8"]
    assert variant.is_passed
    assert not Variant(**{**variant.model_dump(), "gates": ()}).is_passed


def test_bundle_loads_no_model_library() -> None:
    code = (
        "import sys, bundle.manifest, bundle.verify, bundle.hashing;"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
