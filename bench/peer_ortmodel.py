"""optimum's `ORTModelForCausalLM` on a graph of the bundle."""

from __future__ import annotations

from typing import Any

import torch

from bench.peer_transformers import TransformersRunner

PACKAGES = ("optimum-onnx", "onnxruntime", "transformers", "torch")


def load(options: dict[str, Any]) -> TransformersRunner:
    """Options: `path`, `num_threads`."""
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(options["num_threads"])
    session_options = SessionOptions()
    session_options.intra_op_num_threads = options["num_threads"]
    session_options.log_severity_level = 3  # `logit_rows` can be fed, but need not be
    model = ORTModelForCausalLM.from_pretrained(options["path"], session_options=session_options)
    return TransformersRunner(model)
