"""optimum's `ORTModelForCausalLM` on a graph of the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.peers.engines.peer_transformers import TransformersRunner
from bundle.model_folder import open_model_folder

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers", "torch")


def load(options: dict[str, Any]) -> TransformersRunner:
    """Options: `path`, `num_threads`."""
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    from serve.models.pretrained import make_config

    torch.set_num_threads(options["num_threads"])
    session_options = SessionOptions()
    session_options.intra_op_num_threads = options["num_threads"]
    session_options.log_severity_level = 3  # `logit_rows` can be fed, but need not be
    folder = open_model_folder(Path(options["path"]), has_weights=False)
    model = ORTModelForCausalLM.from_pretrained(
        folder.path, config=make_config(folder), session_options=session_options
    )
    return TransformersRunner(model)
