"""A bundle's ONNX graph behind `serve.models.backend.Backend`: one buffer for past and present.

A step writes new keys and values in place and copies nothing: past and present of each layer are
bound to the same rows of the cache. What else a step feeds is small, lies in one piece of memory
and reaches the device in one copy.

`serve.models.onnx_graph` says what the graph is fed, `serve.models.onnx_session` on what it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import torch

from bundle.model_config import read_model_config
from serve.models.backend import ModelInfo, logit_rows
from serve.models.batch_invariance import choose_way
from serve.models.cuda_graphs import batch_bucket
from serve.models.kv_cache import CachedRows, KVCache
from serve.models.onnx_graph import TOTAL_LENGTH
from serve.models.onnx_session import (
    NO_GRAPH,
    BoundStep,
    StepInputs,
    bind_tensor,
    check_provider,
    make_session,
    open_stream,
    run_options,
)
from serve.text.real_tokens import EVERY_ROW, RealTokens

_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}


class OnnxBackend(CachedRows):
    """See `serve.models.backend.Backend`. One instance serves one model from one thread.

    GroupQueryAttention takes several new tokens per row behind cached ones only for a single row;
    such a batch runs row by row.

    The int8 kernels of the CPU take rows in pairs and round a lone last row differently. So that a
    sequence never depends on its neighbours, every product gets an even number of rows there: a
    decode step of an odd batch runs one scratch row more, a prefill one column more
    (docs/decisions/001-batch-invariance.md).
    `choose_kernels` finds out whether that is enough, or whether it takes a larger multiple.

    With `cuda_graphs` a decode step is padded to one of a few batch sizes, and its attention is
    planned for rows of `max_model_len`: always the same kernels at the same addresses, which
    `prepare` records. On the CPU there is nothing to record, and the steps are the same.
    """

    ROW_MULTIPLES: ClassVar[tuple[int, ...]] = (2, 4, 8)
    """Of how many rows a product on the CPU may have to be a multiple, fastest first."""

    def __init__(
        self,
        session: ort.InferenceSession,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        precision: str,
        num_parameters: int,
        max_num_seqs: int,
        max_model_len: int,
        stream: Any = None,
        cuda_graphs: bool = False,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> None:
        self._session = session
        self._device = device
        self.stream = stream
        self._num_rows: int = config["vocab_size"]
        self._real_tokens = real_tokens.within(self._num_rows)
        self.info = ModelInfo(
            backend="onnx",
            device=str(device),
            precision=precision,
            num_parameters=num_parameters,
            vocab_size=self._real_tokens.num_tokens,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self.cache = _make_cache(session, self.info, device)
        (logits,) = [o for o in session.get_outputs() if o.name == "logits"]
        self._logits_type = _TORCH_TYPES[logits.type]
        # Where a decode step's logits stay, also for graphs that have the address.
        self._decode_logits = self._new_logits(max_num_seqs)
        self._logits = self._new_logits(0)
        self._total_length = np.ones((), dtype=np.int32)
        self._has_static_steps = cuda_graphs
        self._row_multiple = self.ROW_MULTIPLES[0] if device.type == "cpu" else 1
        self._padded_sizes = padded_sizes(max_num_seqs, self._row_multiple, cuda_graphs)
        self._graph_thread: int | None = None
        self._decode_steps: dict[int, BoundStep] = {}
        self._cache_binding = lru_cache(maxsize=4 * max_num_seqs)(self._bind_cache)
        self._options = run_options(NO_GRAPH)
        if stream is not None:
            torch.cuda.synchronize(device)  # the cache was zeroed on another stream

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
        shares_cores: bool = True,
        stream: int | None = None,
        cuda_graphs: bool | None = None,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> OnnxBackend:
        """Load `variant_dir/model.onnx` beside its `config.json`.

        Logits are those of `real_tokens`, of all that the graph has by default.
        `shares_cores` False lets threads spin between steps: for the only model on these cores.
        `stream` is the address of the CUDA stream to work on; by default the backend makes its
        own. `cuda_graphs` is by default True on CUDA.

        Raises RuntimeError when `device` is cuda and onnxruntime cannot use it, and ValueError
        when `max_model_len` exceeds what the graph's rotary tables cover, when the graph is not
        one that `export.graph.trace` wrote, or is one that CUDA has no kernels for.
        """
        config = read_model_config(variant_dir).settings
        limit = config["max_position_embeddings"]
        if max_model_len > limit:
            raise ValueError(f"max_model_len {max_model_len} exceeds the {limit} of {variant_dir}")
        where = torch.device(device)
        on_cuda = where.type == "cuda"
        has_graphs = on_cuda if cuda_graphs is None else cuda_graphs
        check_provider(device)
        own_stream = open_stream(where, stream) if on_cuda else None
        return cls(
            make_session(
                variant_dir / "model.onnx",
                device,
                num_threads,
                shares_cores=shares_cores,
                stream=own_stream.cuda_stream if own_stream else 0,
                cuda_graphs=has_graphs,
            ),
            config,
            device=where,
            precision=precision or variant_dir.name,
            num_parameters=num_parameters,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            stream=own_stream,
            cuda_graphs=has_graphs,
            real_tokens=real_tokens,
        )

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        with self._ordered():
            if not any(past_lengths):
                return self._run(first_row, new_token_ids, past_lengths, logit_indices)
            if first_row == 0 and all(len(ids) == 1 for ids in new_token_ids):
                return self._decode(new_token_ids, past_lengths, logit_indices)
            wanted = logit_indices or [[len(ids) - 1] for ids in new_token_ids]
            rows = zip(new_token_ids, past_lengths, wanted, strict=True)
            return torch.cat(
                [
                    self._run(row, [ids], [past], [indices]).clone()
                    for row, (ids, past, indices) in enumerate(rows, first_row)
                ]
            )

    def choose_kernels(self) -> None:
        """See `Backend.choose_kernels`."""
        if self._device.type != "cpu":
            return
        holds = choose_way(self, self.ROW_MULTIPLES, self._take_multiple)
        self.info = replace(self.info, batch_invariant=holds)

    def _take_multiple(self, row_multiple: int) -> None:
        self._row_multiple = row_multiple
        self._padded_sizes = padded_sizes(
            self.info.max_num_seqs, row_multiple, self._has_static_steps
        )
        self._decode_steps.clear()

    def prepare(self) -> None:
        """Record one CUDA graph per batch size, for steps on the calling thread alone.

        onnxruntime keeps its graphs per thread, and while it records, no thread of the process may
        allocate device memory: call it on the engine's thread before any engine has work. Rows up
        to `max_num_seqs` are overwritten. Steps run without graphs before it, and on other threads.
        """
        self._graph_thread = threading.get_ident()
        for num_rows in sorted(set(self._padded_sizes[1:]) if self._has_static_steps else ()):
            self.forward(0, [[0]] * num_rows, [1] * num_rows)

    # -- steps ------------------------------------------------------------------------------

    def _decode(
        self,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None,
    ) -> torch.Tensor:
        """Run one token for each of the rows from 0 on, and for free rows behind them as padding.

        Shapes and addresses repeat from step to step, so that nothing is bound anew.
        """
        num_rows = len(new_token_ids)
        step = self._decode_steps.get(num_rows) or self._new_decode_step(num_rows)
        inputs = step.inputs
        inputs.input_ids[:num_rows] = new_token_ids
        inputs.last_positions[:num_rows] = past_lengths
        if self._has_static_steps:
            inputs.last_positions[num_rows:] = 0  # a larger batch of the same size left its own
        total_length = self.info.max_model_len if self._has_static_steps else max(past_lengths) + 1
        has_graph = self._graph_thread == threading.get_ident()
        logits = self._run_step(step, total_length, step.options if has_graph else self._options)
        if logit_indices is None:
            return logits
        return logits[logit_rows(new_token_ids, logit_indices, 1)]

    def _new_decode_step(self, num_rows: int) -> BoundStep:
        num_padded = self._padded_sizes[num_rows]
        if self._has_static_steps and num_padded > num_rows:
            step = self._decode_steps.get(num_padded) or self._new_decode_step(num_padded)
        else:
            inputs = StepInputs(num_padded, 1, num_padded, self._device)
            # A scratch row's logits are the last sequence's, lest they count where activations are
            # quantized by the largest of the batch.
            inputs.logit_rows[:] = [*range(num_rows), *[num_rows - 1] * (num_padded - num_rows)]
            options = run_options(num_rows if self._has_static_steps else NO_GRAPH)
            binding = self._bind_cache(0, num_padded)
            step = self._bind_step(binding, inputs, self._decode_logits[:num_padded], options)
        self._decode_steps[num_rows] = step = replace(step, logits=step.logits[:num_rows])
        return step

    def _run(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None,
    ) -> torch.Tensor:
        """Run a first prefill of several rows, or any number of tokens for one row."""
        num_rows, num_columns = len(new_token_ids), max(map(len, new_token_ids))
        if self._device.type == "cpu":
            # A scratch row would be another sequence's; a scratch column is behind this one's end.
            num_columns = self._pad_columns(num_rows, max(num_columns, 2), max(past_lengths))
        wanted = logit_rows(new_token_ids, logit_indices, num_columns)
        num_wanted = len(wanted)
        wanted = wanted or [0]  # memory of no bytes cannot be bound
        if self._device.type == "cpu":
            wanted += wanted[-1:] * (-len(wanted) % self._row_multiple)
        inputs = StepInputs(num_rows, num_columns, len(wanted), self._device)
        inputs.logit_rows[:] = wanted
        for row, (ids, past) in enumerate(zip(new_token_ids, past_lengths, strict=True)):
            inputs.input_ids[row, : len(ids)] = ids
            # Behind cached tokens the operator counts back from the end, padding included.
            inputs.last_positions[row] = past + (num_columns if past else len(ids)) - 1
        if len(self._logits) < len(wanted):
            self._logits = self._new_logits(len(wanted))
        binding = self._cache_binding(first_row, num_rows)
        step = self._bind_step(binding, inputs, self._logits[: len(wanted)], self._options)
        return self._run_step(step, max(past_lengths) + num_columns, self._options)[:num_wanted]

    def _pad_columns(self, num_rows: int, num_columns: int, past: int) -> int:
        """Return with how many columns a pass has a multiple of `row_multiple` rows."""
        for padded in range(
            num_columns, min(num_columns + self._row_multiple, self.cache.max_len + 1 - past)
        ):
            if num_rows * padded % self._row_multiple == 0:
                return padded
        return num_columns + num_rows * num_columns % 2

    def _run_step(
        self, step: BoundStep, total_length: int, options: ort.RunOptions
    ) -> torch.Tensor:
        """Run what is bound; return logits `(N, V)` float32."""
        self._total_length[...] = total_length
        step.inputs.upload()
        self._session.run_with_iobinding(step.binding, options)
        return self._real_tokens.cut(step.logits.float())

    def _new_logits(self, num_rows: int) -> torch.Tensor:
        shape = (num_rows + num_rows % 2, self._num_rows)
        return torch.empty(shape, dtype=self._logits_type, device=self._device)

    # -- bindings ---------------------------------------------------------------------------

    def _bind_cache(self, first_row: int, num_rows: int) -> Any:
        """Bind past and present of every layer to the same rows of the cache."""
        binding = self._session.io_binding()
        for layer, (keys, values) in enumerate(
            zip(self.cache.keys, self.cache.values, strict=True)
        ):
            for kind, cached in (("key", keys), ("value", values)):
                rows = cached[first_row : first_row + num_rows]
                bind_tensor(binding.bind_input, f"past_key_values.{layer}.{kind}", rows)
                bind_tensor(binding.bind_output, f"present.{layer}.{kind}", rows)
        # The operator reads it on the host, before it launches anything.
        bind_tensor(binding.bind_input, TOTAL_LENGTH, torch.from_numpy(self._total_length))
        return binding

    def _bind_step(
        self, binding: Any, inputs: StepInputs, logits: torch.Tensor, options: ort.RunOptions
    ) -> BoundStep:
        for name, tensor in inputs.tensors.items():
            bind_tensor(binding.bind_input, name, tensor)
        bind_tensor(binding.bind_output, "logits", logits[None])
        return BoundStep(binding, inputs, logits, options)

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """Queue the block on the session's stream, in order with the caller's own stream."""
        if self.stream is None:
            yield
            return
        callers = torch.cuda.current_stream(self._device)
        if callers.cuda_stream == self.stream.cuda_stream:
            yield
            return
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            yield
        callers.wait_stream(self.stream)


def _make_cache(session: ort.InferenceSession, info: ModelInfo, device: torch.device) -> KVCache:
    """Return a cache of the graph's type; one column more than the context is for padding."""
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    _, num_kv_heads, _, head_dim = past[0].shape
    shape = (info.rows.num_rows, num_kv_heads, info.max_model_len + 1, head_dim)
    return KVCache(len(past) // 2, shape, _TORCH_TYPES[past[0].type], device)


def padded_sizes(max_num_seqs: int, row_multiple: int, is_static: bool) -> tuple[int, ...]:
    """Return how many rows a decode step of 0, 1, ... `max_num_seqs` rows runs.

    One row behind those of sequences is free: where a multiple takes more, an even number must do.

    >>> padded_sizes(6, 1, is_static=True)
    (0, 1, 2, 4, 4, 6, 6)
    >>> padded_sizes(6, 2, is_static=False)
    (0, 2, 2, 4, 4, 6, 6)
    >>> padded_sizes(6, 4, is_static=False)
    (0, 4, 4, 4, 4, 6, 6)
    """
    sizes = range(max_num_seqs + 1)
    if is_static:
        return (0, *(batch_bucket(n, max_num_seqs) for n in sizes[1:]))
    padded = (n + -n % row_multiple for n in sizes)
    return tuple(
        p if p <= max_num_seqs + 1 else n + n % 2 for n, p in zip(sizes, padded, strict=True)
    )
