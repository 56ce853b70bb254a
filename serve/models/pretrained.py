"""A judged model folder as a configuration or a model of transformers.

transformers is given settings and tensors and no path, so that it reads nothing of the folder: no
adapter, no generation loop, no code and no key that `bundle.model_folder` did not let through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from bundle.model_folder import ModelFolder, open_model_folder
from bundle.token_ids import one_or_list

# torch's own; a folder may name another, which would be fetched and called.
_ATTENTION = "sdpa"


def make_config(folder: ModelFolder) -> Any:
    """Return the `PretrainedConfig` of a folder."""
    ids = folder.token_ids
    return CONFIG_MAPPING[folder.config.model_type](
        **folder.config.settings,
        dtype=folder.config.dtype,
        bos_token_id=ids.bos,
        eos_token_id=one_or_list(ids.eos),
        pad_token_id=ids.pad,
        attn_implementation=_ATTENTION,
    )


def load_pretrained(folder: ModelFolder | Path, dtype: torch.dtype) -> Any:
    """Return the model of a folder on the CPU, in `dtype` and in evaluation mode.

    Raises:
        ModelFolderError: the folder is not one that `open_model_folder` takes.
    """
    if isinstance(folder, Path):
        folder = open_model_folder(folder, has_tokenizer=False)
    config = make_config(folder)
    model, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=_read_tensors(folder),
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
    )
    assert not loading["missing_keys"], loading["missing_keys"]
    model.config.name_or_path = str(folder.path)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def _read_tensors(folder: ModelFolder) -> dict[str, torch.Tensor]:
    """Return the tensors of the model, mapped from their files and not copied."""
    tensors = {}
    for path in folder.weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in folder.tensors:
                    tensors[name] = file.get_tensor(name)
    return tensors
