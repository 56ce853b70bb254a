"""Tandem's engine in process: scheduler, sampler and log-probabilities included, gRPC not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from serve.engine.engine import Engine
from serve.engine.offline import OfflineEngine
from serve.engine.sequence import FinishReason, GenerationRequest
from serve.models.backend import Backend
from serve.sampling.params import SamplingParams

PACKAGES = ("torch", "transformers", "onnxruntime")


class TandemRunner:
    """See `bench.peers.worker.PeerModel`. Works on the calling thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._engine = OfflineEngine(Engine(backend, eos_token_ids=frozenset()))
        self._request_ids = itertools.count()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        requests = [
            GenerationRequest(str(next(self._request_ids)), tuple(prompt), sampling)
            for prompt in prompts
        ]
        ends = {r.request_id: event for r, event in self._engine.generate(requests)}
        events = [ends[request.request_id] for request in requests]
        assert all(e.finish_reason is FinishReason.LENGTH for e in events), events
        return [event.token_ids for event in events]

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        last = len(token_ids) - 1
        wanted = list(range(last - num_rows, last))
        return self._backend.forward(0, [token_ids], [0], [wanted]).numpy().copy()


def load(options: dict[str, Any]) -> TandemRunner:
    """Options: `backend` onnx or torch, `path`, `num_threads`, `max_num_seqs`, `max_model_len`."""
    make = {"onnx": _load_onnx, "torch": _load_torch}[options["backend"]]
    return TandemRunner(make(options))


def _load_onnx(options: dict[str, Any]) -> Backend:
    from serve.models.onnx_backend import OnnxBackend

    torch.set_num_threads(1)  # as `serve.app.loading` does: torch only samples
    return OnnxBackend.load(
        Path(options["path"]),
        device="cpu",
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
        num_threads=options["num_threads"],
        shares_cores=False,
    )


def _load_torch(options: dict[str, Any]) -> Backend:
    from serve.models.torch_backend import TorchBackend

    torch.set_num_threads(options["num_threads"])
    return TorchBackend.load(
        Path(options["path"]),
        device="cpu",
        dtype=torch.bfloat16,
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
    )
