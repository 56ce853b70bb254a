"""The one door for a folder that a user names: a teacher, a student, a model in a bundle.

Everything that a library would read from it is judged first, from raw JSON and the headers of
safetensors; no model library is imported. Who opens a model builds it from what is here
(`serve.models.pretrained`), so that a key, a link or a file that nobody thought of is not read at
all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bundle.errors import ModelFolderError, one_line
from bundle.json_files import check_plain_file, read_object
from bundle.model_config import CONFIG_NAME, ModelConfig, check_stays, read_model_config
from bundle.model_weights import TensorHeader, check_tensors, find_weights, read_headers
from bundle.token_ids import (
    GENERATION_CONFIG_NAME,
    TOKENIZER_CONFIG_NAME,
    TokenIds,
    read_token_ids,
)

logger = logging.getLogger(__name__)

TOKENIZER_NAME = "tokenizer.json"
# Run code when they are loaded.
PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"})
# Read by libraries for what lies elsewhere: the base model of an adapter, a generation loop.
_LEADS_OUT = {
    "adapter_config.json": "is an adapter: merge it into its base model and give that folder",
    "custom_generate": "holds code",
}
_TEMPLATES_FOLDER = "additional_chat_templates"
# Configurations that may name code, beside the model's own.
_OTHER_CONFIGS = (
    GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_NAME, "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
# What may be read, if it is there.
_READ_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".onnx", ".data"})


@dataclass(frozen=True)
class ModelFolder:
    """A folder that is safe to load: all that its files say about the model.

    `tensors` are the weights that are loaded, by name; empty where none were asked for.
    """

    path: Path
    config: ModelConfig
    token_ids: TokenIds
    weights: tuple[Path, ...]
    tensors: Mapping[str, TensorHeader]

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers the weights hold, a tied head once."""
        return sum(tensor.num_values for tensor in self.tensors.values())

    @cached_property
    def dtype(self) -> str:
        """The type of most weights, as safetensors calls it ("BF16")."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_values
        return max(counts, key=lambda dtype: counts[dtype])


def open_model_folder(
    path: Path, *, has_weights: bool = True, has_tokenizer: bool = True
) -> ModelFolder:
    """Judge a folder and return what it holds; nothing of it is loaded (milliseconds).

    `has_weights` False is for a graph's folder, which has a configuration and no safetensors.

    Raises:
        ModelFolderError: a file is missing, damaged, unsafe, or of a model that is not supported;
            the text names file and key, what is there, and what is allowed.
    """
    check_files(path)
    needed = [CONFIG_NAME, *([TOKENIZER_NAME] if has_tokenizer else [])]
    missing = [name for name in needed if not os.path.lexists(path / name)]
    weights = find_weights(path) if has_weights else ()
    if has_weights and not weights:
        missing.append("model.safetensors (or shards and their index)")
    if missing:
        raise ModelFolderError(f"{path} lacks {', '.join(missing)}")
    for name in needed:
        check_plain_file(path / name)
    config = read_model_config(path)
    for name in _OTHER_CONFIGS:
        if (path / name).exists():
            check_stays(read_object(path / name), path / name)
    token_ids = read_token_ids(path, config.vocab_size)
    tensors = check_tensors(path, config, read_headers(weights)) if weights else {}
    if config.ignored_keys:
        logger.info("%s: not read: %s", path / CONFIG_NAME, ", ".join(config.ignored_keys))
    return ModelFolder(path, config, token_ids, weights, tensors)


def check_files(folder: Path) -> None:
    """Refuse a folder with files that run code, lead out of it, or are none.

    Of subfolders only the one that holds chat templates is read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ModelFolderError(one_line(f"{folder} cannot be read: {error.strerror}")) from None
    names = [entry.name for entry in entries]
    if pickled := [name for name in names if Path(name).suffix.lower() in PICKLED_SUFFIXES]:
        raise ModelFolderError(f"{folder} holds pickles, which can run code: remove {pickled}")
    if code := [name for name in names if Path(name).suffix.lower() in CODE_SUFFIXES]:
        raise ModelFolderError(f"{folder} holds code, which is not run: remove {code}")
    for name in sorted(_LEADS_OUT.keys() & set(names)):
        raise ModelFolderError(f"{folder / name} {_LEADS_OUT[name]}")
    for entry in entries:
        if entry.suffix in _READ_SUFFIXES:
            check_plain_file(entry)
    templates = folder / _TEMPLATES_FOLDER
    if templates.is_symlink():
        raise ModelFolderError(f"{templates} is a link: copy the folder itself")
    for template in sorted(templates.glob("*.jinja")):
        check_plain_file(template)
