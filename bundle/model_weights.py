"""The safetensors files of a model's folder: which ones are loaded, and what their headers say.

Loaded are `model.safetensors`, or the shards that `model.safetensors.index.json` names, and no
other: Mistral's folders hold the same weights a second time in `consolidated.safetensors`. Headers
are read here alone, so that a file that lies about itself is refused before anything maps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import ModelFolderError, one_line
from bundle.json_files import check_plain_file, parse_object, read_object
from bundle.model_config import ModelConfig

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor of a file, which is not read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """How many numbers it holds; a scalar one."""
        return math.prod(self.shape)


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the files that hold a folder's weights, sorted by name; none where it has none.

    ModelFolderError for an index that is none or names files elsewhere, for shards that are
    missing or without an index, and where a single file contradicts the index.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if not index.exists() and not index.is_symlink():
        if single.exists() or single.is_symlink():
            check_plain_file(single)
            return (single,)
        return ()
    files = {folder / name for name in read_index(index).values()}
    if single not in files and single.exists():
        raise ModelFolderError(
            f"{folder} holds {WEIGHTS_NAME} beside the shards that {INDEX_NAME} names: "
            "remove the one that is not the model"
        )
    for path in sorted(files):
        if not path.exists() and not path.is_symlink():
            raise ModelFolderError(f"{folder} lacks {path.name}, which {INDEX_NAME} names")
        check_plain_file(path)
    return tuple(sorted(files))


def read_index(path: Path) -> Mapping[str, str]:
    """Return which file of the folder holds which tensor."""
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelFolderError(one_line(f"{path} has no weight_map"))
    for name in files.values():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ModelFolderError(one_line(f"{path} names weights elsewhere: {name!a}"))
        if not name.endswith(".safetensors"):
            raise ModelFolderError(one_line(f"{path} names {name!a}, which is no safetensors file"))
    return files


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Return the tensors of some files by name; ModelFolderError for a damaged file."""
    tensors: dict[str, TensorHeader] = {}
    for path in files:
        try:
            found = dict(_read_header(path))
        except OSError as error:
            reason = error.strerror
        except ValueError as error:
            reason = str(error)
        else:
            if twice := sorted(found.keys() & tensors.keys()):
                raise ModelFolderError(
                    one_line(f"{path} holds {twice[0]!r}, as {tensors[twice[0]].file.name} does")
                )
            tensors |= found
            continue
        raise ModelFolderError(one_line(f"{path} cannot be read as safetensors: {reason}"))
    return tensors


def _read_header(path: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Yield what a header says; ValueError unless the data behind it is just what it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or num_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"its header of {num_bytes} bytes exceeds the file")
        header = parse_object(file.read(num_bytes))
    header.pop("__metadata__", None)
    ends = []
    for name, tensor in header.items():
        dtype, shape, start, end = _fields(name, tensor)
        if end - start != _SIZES[dtype] * math.prod(shape):
            raise ValueError(f"{name!r} is {dtype} of shape {shape} in {end - start} bytes")
        ends.append((start, end))
        yield name, TensorHeader(path, dtype, shape)
    position = 0
    for start, end in sorted(ends):
        if start != position:
            raise ValueError(f"tensors overlap or leave a gap at byte {position} of its data")
        position = end
    if position != size - 8 - num_bytes:
        raise ValueError(f"its data has {size - 8 - num_bytes} bytes, its header {position}")


def _fields(name: str, tensor: object) -> tuple[str, tuple[int, ...], int, int]:
    match tensor:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            dtype in _SIZES
            and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
            and 0 <= start <= end
        ):
            return dtype, tuple(shape), start, end
    raise ValueError(f"{name!r} has no type, shape and place that it knows")


# --- against the configuration -------------------------------------------------------------------


def check_tensors(
    folder: Path, config: ModelConfig, tensors: Mapping[str, TensorHeader]
) -> dict[str, TensorHeader]:
    """Return the tensors that the model has; what else a file holds (old buffers) is not loaded.

    Refused are weights that are not those of the configuration: a layer would be random or left
    out. ModelFolderError names the first tensor that is missing, of another shape, quantized, or
    part of a layer that this architecture does not have.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelFolderError(f"{folder} lacks weights, {name} first: they would be random")
        tensor = tensors[name]
        if tensor.dtype not in _FLOATS:
            raise ModelFolderError(
                f"{tensor.file}: {name} is of type {tensor.dtype}, allowed are {', '.join(_FLOATS)}"
            )
        if tensor.shape != shape:
            raise ModelFolderError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
                f"config.json says {list(shape)}"
            )
    layers = tuple(f"model.layers.{layer}." for layer in range(config.num_hidden_layers))
    for name in sorted(tensors.keys() - expected.keys()):
        if name.startswith(layers) and not name.endswith("rotary_emb.inv_freq"):
            raise ModelFolderError(
                one_line(
                    f"{tensors[name].file} holds {name}, which a {config.model_type} of this "
                    "configuration does not use"
                )
            )
    return {name: tensors[name] for name in expected}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that a configuration asks for, in the model's order."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, wide, head = config.hidden_size, config.intermediate_size, config.head_dim
    attention_bias = bool(config.settings.get("attention_bias", False))
    mlp_bias = bool(config.settings.get("mlp_bias", False))
    is_qwen2 = config.model_type == "qwen2"
    linears = {
        "self_attn.q_proj": (config.num_attention_heads * head, hidden, attention_bias or is_qwen2),
        "self_attn.k_proj": (config.num_key_value_heads * head, hidden, attention_bias or is_qwen2),
        "self_attn.v_proj": (config.num_key_value_heads * head, hidden, attention_bias or is_qwen2),
        "self_attn.o_proj": (hidden, config.num_attention_heads * head, attention_bias),
        "mlp.gate_proj": (wide, hidden, mlp_bias),
        "mlp.up_proj": (wide, hidden, mlp_bias),
        "mlp.down_proj": (hidden, wide, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.model_type == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return shapes | dict.fromkeys(norms, (hidden,))
