"""What the float graph's matrix products read while it reads calibration text.

Texts go through the graph one at a time, prompt and completion, so no padding is ever counted.
GPTQ wants second moments (`collect_hessians`), static quantization wants ranges (`TextReader`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader

from export.run.errors import ExportError
from export.run.variants import StaticVariant, WeightOnlyVariant
from export.teacher.examples import Example

Feed = dict[str, np.ndarray]


def calibration_texts(
    config: WeightOnlyVariant | StaticVariant, texts: Sequence[Example]
) -> Sequence[Example]:
    """Return as many of `texts` as `config` calibrates on. Raises ExportError if there is none."""
    if not texts:
        raise ExportError(f"{config.method}: there is no calibration text; at least one is needed")
    return texts[: config.num_calibration_texts]


def text_feeds(model: onnx.ModelProto, texts: Iterable[Example]) -> Iterator[Feed]:
    """Yield the graph's inputs for each text: all of it at once behind an empty cache."""
    cache = _empty_cache(model.graph)
    for text in texts:
        ids = np.array([text.prompt_token_ids + text.completion_token_ids], dtype=np.int64)
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache}


def _empty_cache(graph: onnx.GraphProto) -> Feed:
    cache = {}
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            _, num_heads, _, head_dim = (d.dim_value for d in value.type.tensor_type.shape.dim)
            cache[value.name] = np.zeros((1, num_heads, 0, head_dim), dtype=np.float32)
    return cache


class TextReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """The texts as onnxruntime's calibrators want them: a range of them, one after the other."""

    def __init__(self, model: onnx.ModelProto, texts: Sequence[Example]) -> None:
        self._feeds = list(text_feeds(model, texts))
        self._remaining = iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._remaining = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Feed | None:
        return next(self._remaining, None)


def collect_hessians(
    source: Path, tensors: Sequence[str], texts: Iterable[Example]
) -> dict[str, torch.Tensor]:
    """Run the graph in `source` over the texts and return H = 2 X Xᵀ of each tensor's rows.

    X is `(K, all positions of all texts)`, so each H is `(K, K)` float32 (Frantar et al. 2023,
    section 3). A tensor is named as in the graph, `(1, T, K)` there.
    """
    session, model = _observing_session(source, tensors)
    hessians: dict[str, torch.Tensor] = {}
    for feed in text_feeds(model, texts):
        for name, value in zip(tensors, session.run(list(tensors), feed), strict=True):
            rows = torch.from_numpy(value).flatten(0, -2)
            if name not in hessians:
                hessians[name] = torch.zeros(rows.shape[1], rows.shape[1])
            hessians[name].addmm_(rows.T, rows, alpha=2)
    return hessians


def hessian_groups(num_channels: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Yield the tensors in groups whose float32 Hessians fit into `max_bytes`, one at the least."""
    group: list[str] = []
    size_bytes = 0
    for name, count in num_channels.items():
        if group and size_bytes + 4 * count**2 > max_bytes:
            yield group
            group, size_bytes = [], 0
        group.append(name)
        size_bytes += 4 * count**2
    if group:
        yield group


def _observing_session(
    source: Path, tensors: Sequence[str]
) -> tuple[InferenceSession, onnx.ModelProto]:
    """Open the graph with `tensors` for outputs; its weights are read from where they lie."""
    model = onnx.load(source / "model.onnx", load_external_data=False)
    del model.graph.output[:]
    for name in tensors:
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    options = SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(source)
    )
    # Level 3 is errors: `logit_rows` may be fed, and a warning says so.
    options.log_severity_level = 3
    session = InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, model
