"""onnxruntime sessions for serving: on one device, failing closed, and what a step binds to one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from serve.models.onnx_graph import LAST_POSITIONS, LOGIT_ROWS, check_cuda_types, serving_graph

NO_GRAPH = -1

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# numpy has no bfloat16, so that tensors are bound by onnx's numbers.
_ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
}


def check_provider(device: str) -> None:
    """Raise RuntimeError when this onnxruntime has nothing to compute with on `device`."""
    provider = _PROVIDERS[torch.device(device).type]
    if provider not in ort.get_available_providers():
        raise RuntimeError(
            f"{provider} is not available in this onnxruntime; available are "
            f"{', '.join(ort.get_available_providers())}. Install the extra `gpu`, or use the "
            f"device cpu"
        )


def make_session(
    path: Path,
    device: str,
    num_threads: int | None,
    *,
    stream: int = 0,
    cuda_graphs: bool = False,
    shares_cores: bool = True,
    profile_prefix: Path | None = None,
) -> ort.InferenceSession:
    """Open `serving_graph(path)` on `device` (cpu or cuda), failing closed when CUDA is missing.

    `session_options` says what `shares_cores` does. `stream` is the address of a CUDA stream. With
    `cuda_graphs`, onnxruntime itself refuses a graph that needs a copy between host and device or
    has a node on the CPU. `profile_prefix` makes the session write what ran where, when its
    `end_profiling` is called.
    """
    check_provider(device)
    where = torch.device(device)
    provider = _PROVIDERS[where.type]
    graph = serving_graph(path)
    if where.type == "cuda":
        check_cuda_types(graph, path)
        # Those of torch's CUDA libraries that torch has not loaded itself.
        ort.preload_dlls()
    session = ort.InferenceSession(
        graph.SerializeToString(),
        session_options(path, where, num_threads, shares_cores, profile_prefix),
        providers=[provider],
        provider_options=[provider_options(where, stream, cuda_graphs)],
        # Otherwise it prints an error and goes on with the CPU.
        enable_fallback=0,
    )
    check_first_provider(session, provider)
    return session


def check_first_provider(session: ort.InferenceSession, provider: str) -> None:
    """Raise RuntimeError unless the session prefers `provider`.

    A provider whose libraries are missing is left out with nothing but a line in the log.
    """
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime fell back from {provider}; refusing to run on the CPU")


def session_options(
    path: Path,
    device: torch.device,
    num_threads: int | None,
    shares_cores: bool = True,
    profile_prefix: Path | None = None,
) -> ort.SessionOptions:
    """Return the options of a session over the graph of `path`, whose weights lie beside it.

    Threads go on spinning between steps unless the session `shares_cores` with another model, which
    that would slow down. Alone, a step is 3 to 6 % faster with them awake
    (docs/decisions/008-threads-that-wait.md).
    """
    options = ort.SessionOptions()
    num_cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    options.intra_op_num_threads = num_threads or num_cores
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", str(int(shares_cores)))
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    # Level 3 is errors: what is left after the rewriting is no one's concern.
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return options


def provider_options(device: torch.device, stream: int, cuda_graphs: bool) -> dict[str, str]:
    """Return the options of the provider for `device`; `stream` is an address, 0: its own."""
    if device.type == "cpu":
        return {}
    options = {
        "device_id": str(device.index or 0),
        "enable_cuda_graph": str(int(cuda_graphs)),
        # The cache takes what it wants; the rest is for torch and the other model.
        "arena_extend_strategy": "kSameAsRequested",
        # The head is float32 for the sake of log-probabilities, and bound by memory anyway.
        "use_tf32": "0",
    }
    return options | ({"user_compute_stream": str(stream)} if stream else {})


def open_stream(device: torch.device, address: int | None) -> Any:
    if address is None:
        return torch.cuda.Stream(device)
    return torch.cuda.ExternalStream(address, device=device)


def run_options(graph_id: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    # Whatever reads the logits is queued on the same stream.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def bind_tensor(bind: Any, name: str, tensor: torch.Tensor) -> None:
    """Have a binding's `bind_input` or `bind_output` read or write the memory of `tensor`."""
    device = tensor.device
    bind(
        name,
        device.type,
        device.index or 0,
        _ELEMENT_TYPES[tensor.dtype],
        tuple(tensor.shape),
        tensor.data_ptr(),
    )


class StepInputs:
    """What a step feeds besides the cache, one after the other in one piece of memory.

    To be filled: `input_ids` `(B, T)` and `logit_rows` `(N,)`, int64, and `last_positions` `(B,)`,
    int32: the position of each row's last token. `tensors` are the same by name, on the device.
    """

    def __init__(self, num_rows: int, num_columns: int, num_logits: int, device: torch.device):
        sizes = (num_rows * num_columns, num_logits, (num_rows + 1) // 2)
        self._host = torch.zeros(sum(sizes), dtype=torch.int64)
        self._on_device = self._host if device.type == "cpu" else self._host.to(device)
        ids, rows, positions = self._on_device.split(sizes)
        self.tensors = {
            "input_ids": ids.view(num_rows, num_columns),
            LOGIT_ROWS: rows,
            LAST_POSITIONS: positions.view(torch.int32)[:num_rows],
        }
        ids, rows, positions = self._host.split(sizes)
        self.input_ids: NDArray[np.int64] = ids.view(num_rows, num_columns).numpy()
        self.logit_rows: NDArray[np.int64] = rows.numpy()
        self.last_positions: NDArray[np.int32] = positions.view(torch.int32)[:num_rows].numpy()

    def upload(self) -> None:
        """Bring what was filled in to the device; on the CPU it is there."""
        if self._on_device is not self._host:
            # A pinned copy each time, which torch keeps until it has arrived: the next step may
            # fill the arrays before.
            self._on_device.copy_(self._host.pin_memory(), non_blocking=True)


@dataclass(frozen=True, slots=True)
class BoundStep:
    """A bound step, and those of its logits that are wanted. It keeps its inputs alive: the binding
    has addresses only.
    """

    binding: Any
    inputs: StepInputs
    logits: torch.Tensor
    options: ort.RunOptions
