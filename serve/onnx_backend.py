"""A bundle's ONNX graph behind `serve.backend.Backend`: one buffer for past and present.

A step writes new keys and values in place and copies nothing: past and present of each layer are
bound to the same rows of the cache. `export.onnx_graph` says what the graph's inputs mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from serve.backend import NUM_SPARE_ROWS, ModelInfo, logit_rows
from serve.kv_cache import KVCache

_ELEMENT_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
_CACHE_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxBackend:
    """See `serve.backend.Backend`. One instance serves one model from one thread.

    GroupQueryAttention takes several new tokens per row behind cached ones only for a single row;
    such a batch runs row by row.

    The int8 kernels take rows in pairs and round a lone last row differently. So that a sequence
    never depends on its neighbours, every product gets an even number of rows: a decode step of an
    odd batch runs one scratch row more, a prefill one column more (docs/log.md).
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        config: dict[str, Any],
        *,
        device: torch.device,
        precision: str,
        num_parameters: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._session = session
        self._device = device
        past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        _, num_kv_heads, _, head_dim = past[0].shape
        self.cache = KVCache(
            len(past) // 2,
            (max_num_seqs + NUM_SPARE_ROWS, num_kv_heads, max_model_len + 1, head_dim),
            _CACHE_TYPES[past[0].type],
            device,
        )
        self.info = ModelInfo(
            backend="onnx",
            device=str(device),
            precision=precision,
            num_parameters=num_parameters,
            vocab_size=config["vocab_size"],
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self._logits = torch.empty(0, dtype=torch.float32, device=device)
        self._binding = lru_cache(maxsize=4 * max_num_seqs)(self._bind_cache)

    @classmethod
    def load(
        cls,
        variant_dir: Path,
        *,
        device: str,
        max_num_seqs: int,
        max_model_len: int,
        precision: str = "",
        num_parameters: int = 0,
        num_threads: int | None = None,
    ) -> OnnxBackend:
        """Load `variant_dir/model.onnx` beside its `config.json`.

        Raises RuntimeError when `device` is cuda and onnxruntime cannot use it, and ValueError
        when `max_model_len` exceeds what the graph's rotary tables cover.
        """
        config = json.loads((variant_dir / "config.json").read_text())
        limit = config["max_position_embeddings"]
        if max_model_len > limit:
            raise ValueError(f"max_model_len {max_model_len} exceeds the {limit} of {variant_dir}")
        return cls(
            make_session(variant_dir / "model.onnx", device, num_threads),
            config,
            device=torch.device(device),
            precision=precision or variant_dir.name,
            num_parameters=num_parameters,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        if not any(past_lengths) or all(len(ids) == 1 for ids in new_token_ids):
            return self._run(first_row, new_token_ids, past_lengths, logit_indices)
        wanted = logit_indices or [[len(ids) - 1] for ids in new_token_ids]
        rows = zip(new_token_ids, past_lengths, wanted, strict=True)
        return torch.cat(
            [
                # Two columns at least: a scratch row would be the next row of this batch.
                self._run(row, [ids], [past], [indices], min_columns=2).clone()
                for row, (ids, past, indices) in enumerate(rows, first_row)
            ]
        )

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """See `Backend.copy_kv`."""
        self.cache.copy_row(source_row, target_row, length)

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        """See `Backend.read_kv`."""
        return self.cache.read(row, start, stop)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        """See `Backend.write_kv`."""
        self.cache.write(row, start, kv)

    def _run(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None,
        min_columns: int = 1,
    ) -> torch.Tensor:
        num_rows, num_columns = _even_shape(new_token_ids, min_columns)
        input_ids = np.zeros((num_rows, num_columns), dtype=np.int64)
        lengths = np.ones(num_rows, dtype=np.int64)
        for row, (ids, past) in enumerate(zip(new_token_ids, past_lengths, strict=True)):
            input_ids[row, : len(ids)] = ids
            # Behind cached tokens the operator counts back from the end, padding included.
            lengths[row] = past + (num_columns if past else len(ids))
        width = max(past_lengths) + num_columns
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        wanted = logit_rows(new_token_ids, logit_indices, num_columns)
        num_wanted = len(wanted)
        wanted += wanted[-1:] * (num_wanted % 2)

        # All device copies stay alive until the run is over: the binding holds addresses only.
        inputs = {
            "input_ids": torch.from_numpy(input_ids).to(self._device),
            "attention_mask": torch.from_numpy(mask).to(self._device),
            "logit_rows": torch.tensor(wanted, device=self._device),
        }
        binding = self._binding(first_row, num_rows)
        for name, tensor in inputs.items():
            self._bind(binding.bind_input, name, tensor, tuple(tensor.shape))
        logits = self._logits_buffer(len(wanted))
        self._bind(binding.bind_output, "logits", logits, (1, *logits.shape))
        self._session.run_with_iobinding(binding)
        return logits[:num_wanted]

    def _logits_buffer(self, num_rows: int) -> torch.Tensor:
        if len(self._logits) < num_rows:
            shape = (num_rows, self.info.vocab_size)
            self._logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._logits[:num_rows]

    def _bind_cache(self, first_row: int, num_rows: int) -> Any:
        """Bind past and present of every layer to the same rows of the cache."""
        binding = self._session.io_binding()
        for layer, (keys, values) in enumerate(
            zip(self.cache.keys, self.cache.values, strict=True)
        ):
            for kind, cached in (("key", keys), ("value", values)):
                rows = cached[first_row : first_row + num_rows]
                shape = tuple(rows.shape)
                self._bind(binding.bind_input, f"past_key_values.{layer}.{kind}", rows, shape)
                self._bind(binding.bind_output, f"present.{layer}.{kind}", rows, shape)
        return binding

    def _bind(self, bind: Any, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        bind(
            name,
            self._device.type,
            self._device.index or 0,
            _ELEMENT_TYPES[tensor.dtype],
            shape,
            tensor.data_ptr(),
        )


def _even_shape(new_token_ids: Sequence[Sequence[int]], min_columns: int) -> tuple[int, int]:
    """Return rows and columns of the padded batch such that their product is even."""
    num_rows, num_columns = len(new_token_ids), max(min_columns, *map(len, new_token_ids))
    if num_columns == 1:
        return num_rows + num_rows % 2, 1
    return num_rows, num_columns + num_rows * num_columns % 2


def make_session(path: Path, device: str, num_threads: int | None) -> ort.InferenceSession:
    """Open a graph on `device` (cpu or cuda), failing closed when CUDA is missing."""
    kind = torch.device(device).type
    provider = _PROVIDERS[kind]
    if provider not in ort.get_available_providers():
        raise RuntimeError(
            f"{provider} is not available in this onnxruntime; available are "
            f"{', '.join(ort.get_available_providers())}. Install the extra `gpu`, or use the "
            f"device cpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Two models share the cores: a pool that spins between its steps slows the other one down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Level 3 is errors: onnxruntime warns that `logit_rows` can be fed, which is its purpose.
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime fell back from {provider}; refusing to run on the CPU")
    return session
