"""A tiny real bundle, damaged in the ways that hashes see and in those that they do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bundle.errors import BundleError, UserError
from bundle.hashing import hash_file
from bundle.manifest import (
    Gate,
    Variant,
    load_manifest,
    write_manifest,
)
from bundle.verify import list_entries, verify_bundle
from export.publish.verify import run_graph, verify_bundle_deep
from tests.support.export.measured import pack

VARIANT = Variant(
    precision="as named",
    opset=18,
    inputs=("input_ids",),
    outputs=("logits",),
    size_bytes=1,
    num_nodes=66,
    gates=(Gate(name="kl", measured=0.0, threshold=0.1, passed=True, unit="nats"),),
    metrics={"argmax_agreement_with_teacher": 1.0, "decode_tokens_per_s": 1.0},
)

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def intact(exported_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    pack(folder, exported_llama, dict.fromkeys(("fp32", "int8"), VARIANT))
    return folder / "bundle"


@pytest.fixture
def bundle(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "bundle"))


def relist(bundle: Path) -> None:
    """Bring the manifest's hashes up to date, as someone who wants to hide a change would."""
    manifest = load_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update={"files": list_entries(bundle)}))


def flip_byte(bundle: Path) -> None:
    path = bundle / "onnx/int8/model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate_weights(bundle: Path) -> None:
    path = bundle / "onnx/int8/model.onnx.data"
    os.truncate(path, path.stat().st_size // 2)


def truncate_graph(bundle: Path) -> None:
    path = bundle / "onnx/int8/model.onnx"
    os.truncate(path, path.stat().st_size // 2)


def swap_tokenizer(bundle: Path) -> None:
    for path in bundle.rglob("tokenizer.json"):
        path.write_text(path.read_text().replace('"!"', '"#!"'))


def swap_template(bundle: Path) -> None:
    for path in bundle.rglob("chat_template.jinja"):
        path.write_text("{{ messages }}")


def swap_tokenizer_of_a_variant(bundle: Path) -> None:
    path = bundle / "onnx/int8/tokenizer.json"
    path.write_text(path.read_text() + " ")


def swap_tokenizer_config_of_a_variant(bundle: Path) -> None:
    (bundle / "onnx/fp32/tokenizer_config.json").write_text("{}")


def remove_tokenizer_of_a_variant(bundle: Path) -> None:
    (bundle / "onnx/fp32/tokenizer.json").unlink()


def remove_graph(bundle: Path) -> None:
    (bundle / "onnx/fp32/model.onnx").unlink()


def read_weights_from_elsewhere(bundle: Path) -> None:
    path = bundle / "onnx/fp32/model.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.external_data).external_data[0]
    assert entry.key == "location"
    entry.value = "../../../weights"
    path.write_bytes(model.SerializeToString())


def rename_operator(bundle: Path) -> None:
    path = bundle / "onnx/int8/model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())


def spoil_weights(bundle: Path) -> None:
    path = bundle / "onnx/fp32/model.onnx.data"
    np.full(path.stat().st_size // 4, np.nan, np.float32).tofile(path)


def test_intact_bundle_is_verified(bundle: Path) -> None:
    assert verify_bundle_deep(bundle) == load_manifest(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "int8/model.onnx.data has sha256"),
        (truncate_weights, r"int8/model.onnx.data has \d+ bytes, manifest.json says"),
        (swap_tokenizer, "tokenizer.json has"),
        (remove_graph, "fp32/model.onnx is missing"),
    ],
)
def test_damage_is_named_by_its_hash(bundle: Path, damage: Damage, message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle_deep(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_tokenizer, "student/tokenizer.json was swapped: its sha256 is"),
        (swap_template, "student/chat_template.jinja was swapped: its sha256 is"),
        (
            swap_tokenizer_of_a_variant,
            "int8/tokenizer.json was swapped: it is not .*student/tokenizer.json",
        ),
        (swap_tokenizer_config_of_a_variant, "fp32/tokenizer_config.json was swapped"),
        (remove_tokenizer_of_a_variant, "fp32/tokenizer.json is missing, and manifest.json"),
        (remove_graph, "fp32/model.onnx is missing, and manifest.json does not list it"),
        (truncate_graph, "int8/model.onnx is no ONNX graph"),
        (read_weights_from_elsewhere, "reads .* from onnx/fp32/../../../weights, which manifest"),
        (truncate_weights, r"int8/model.onnx.data is truncated: .* ends at byte \d+, the file has"),
        (rename_operator, "int8/model.onnx does not run: .*NoSuchOperator"),
        (spoil_weights, r"fp32/model.onnx runs, but 485 of 485 logits are not finite"),
    ],
)
def test_damage_that_the_hashes_were_made_to_fit_is_named(
    bundle: Path, damage: Damage, message: str
) -> None:
    damage(bundle)
    relist(bundle)
    verify_bundle(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle_deep(bundle)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chat_template.jinja", "a\n{% if %}", "the chat template does not compile in line 2"),
        ("tokenizer.json", "{}", "student/tokenizer.json is damaged"),
    ],
)
def test_tokenizer_that_cannot_be_used_is_told(
    bundle: Path, name: str, text: str, message: str
) -> None:
    for path in bundle.rglob(name):
        path.write_text(text)
    sha256 = hash_file(bundle / "student" / name)
    known = {"tokenizer.json": "tokenizer_sha256", "chat_template.jinja": "chat_template_sha256"}
    manifest = load_manifest(bundle).model_copy(update={known[name]: sha256})
    write_manifest(bundle, manifest.model_copy(update={"files": list_entries(bundle)}))
    with pytest.raises(UserError, match=message):
        verify_bundle_deep(bundle)


def test_a_run_is_a_prefill_and_a_step(exported_llama: Any) -> None:
    assert run_graph(exported_llama.variants["int8"]) == {"num_logits": 5 * 97, "num_not_finite": 0}
