"""What an export imports on its way, for the process that others are forked from."""

from __future__ import annotations

import importlib

for _name in (
    "onnxruntime",
    "transformers.models.llama.modeling_llama",
    "export.graph.trace",
    "export.publish.bundle",
    "export.graph.quantize",
    "tests.faults.export.export_child",
):
    importlib.import_module(_name)
