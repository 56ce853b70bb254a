"""Where a graph's nodes run: every one on the device, without copies between."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.gpu_check.machine import Bench, CheckFailedError, Result
from bench.gpu_check.parity import greedy
from bundle.model_config import read_model_config
from serve.models.onnx_backend import OnnxBackend
from serve.models.onnx_session import make_session


def placement(bench: Bench, dtype: str) -> Result:
    """Profile a prefill and two decode steps: every node on the device, no copies between."""
    bench.need_kernels("onnx", dtype)
    provider = "CUDAExecutionProvider" if bench.on_cuda else "CPUExecutionProvider"
    return check_placement(profile_nodes(bench, dtype), provider)


def check_placement(nodes: Counter[tuple[str, str]], provider: str) -> Result:
    """Return how many nodes ran. Raises CheckFailedError for copies, and for other providers."""
    elsewhere = {f"{p} {op}": n for (p, op), n in nodes.items() if p != provider}
    num_memcpy = sum(n for (_, op), n in nodes.items() if op.startswith("Memcpy"))
    found = {
        "num_nodes_run": sum(nodes.values()),
        "num_memcpy": num_memcpy,
        "elsewhere": elsewhere,
    }
    if elsewhere or num_memcpy or not nodes:
        raise CheckFailedError(f"not every node runs on {provider}, without copies", found)
    return found


def profile_nodes(bench: Bench, dtype: str) -> Counter[tuple[str, str]]:
    """Return how often nodes ran, by provider and operator, in one prefill and two decode steps."""
    folder = bench.graphs / dtype
    stream = torch.cuda.Stream(bench.device) if bench.on_cuda else None
    with tempfile.TemporaryDirectory() as scratch:
        session = make_session(
            folder / "model.onnx",
            str(bench.device),
            None,
            stream=stream.cuda_stream if stream else 0,
            profile_prefix=Path(scratch) / "profile",
        )
        backend = OnnxBackend(
            session,
            read_model_config(folder).settings,
            device=bench.device,
            precision=dtype,
            num_parameters=0,
            stream=stream,
            max_num_seqs=bench.sizes.max_num_seqs,
            max_model_len=bench.sizes.max_model_len,
        )
        greedy(backend, bench.tokens(1, 8), 3)
        return count_nodes(json.loads(Path(session.end_profiling()).read_text()))


def count_nodes(events: Sequence[Result]) -> Counter[tuple[str, str]]:
    """Count an onnxruntime profile's nodes by provider and operator.

    >>> kernel = {"cat": "Node", "args": {"provider": "CUDAExecutionProvider", "op_name": "Add"}}
    >>> count_nodes([kernel, kernel, {"cat": "Session", "args": {}}])
    Counter({('CUDAExecutionProvider', 'Add'): 2})
    """
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e["args"]]
    return Counter((args["provider"], args["op_name"]) for args in nodes)


def float32_is_refused(bench: Bench) -> Result:
    """A graph without CUDA kernels must be refused, not run on the CPU."""
    bench.need_cuda()
    return refusal(partial(bench.onnx, "float32"))


def refusal(load: Callable[[], object]) -> Result:
    """Return why `load` refuses. Raises CheckFailedError when it does not."""
    try:
        load()
    except ValueError as error:
        return {"error": str(error)}
    raise CheckFailedError("a graph without CUDA kernels was loaded")
