"""What the checks run on: a device, models and graphs on it, and how much is measured."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bundle.model_config import read_model_config
from bundle.model_folder import open_model_folder
from export.graph.half_precision import to_half
from export.graph.surgery import save_onnx
from export.graph.trace import export_onnx
from serve.models.backend import Backend
from serve.models.onnx_backend import OnnxBackend
from serve.models.pretrained import load_pretrained
from serve.models.torch_backend import TorchBackend

DTYPES = ("float32", "float16", "bfloat16")
# What a runtime cannot run at all.
NO_KERNELS = {
    "cpu": {("onnx", "bfloat16"), ("torch", "float16")},
    "cuda": {("onnx", "float32")},
}
# hidden, intermediate, layers, heads, KV heads, vocabulary, positions; SmolLM2-135M, Llama-3.2-1B.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 320, 64),
    "small": (576, 1536, 30, 9, 3, 49152, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256, 4096),
}


Result = dict[str, Any]


class CheckFailedError(Exception):
    """What was measured, `found`, is not what must be."""

    def __init__(self, problem: str, found: Result | None = None) -> None:
        super().__init__(problem)
        self.found = found or {}


class CheckSkippedError(Exception):
    """The check makes no sense on this device; the text says why."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `dtype` is the one that speed is measured in."""

    dtype: str
    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    num_new_tokens: int
    num_rounds: int
    num_itl_tokens: int
    copy_bytes: int
    max_model_len: int

    @property
    def max_num_seqs(self) -> int:
        return max(self.batch_sizes)


FULL = Sizes("bfloat16", (1, 8, 16, 32, 64), (512, 2048), 64, 3, 512, 2 << 30, 2304)
TINY = Sizes("float32", (1, 2), (16,), 4, 2, 8, 1 << 20, 64)


@dataclass(frozen=True, slots=True)
class Bench:
    """Transformers folders of both models, the student's graphs by dtype, and how much to do."""

    student: Path
    teacher: Path
    graphs: Path
    device: torch.device
    sizes: Sizes

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def onnx(self, dtype: str, *, priority: int = 0) -> OnnxBackend:
        """Load the student's graph; on CUDA, on a stream of its own (priority -1: urgent)."""
        stream = torch.cuda.Stream(self.device, priority=priority) if self.on_cuda else None
        return OnnxBackend.load(
            self.graphs / dtype,
            device=str(self.device),
            max_num_seqs=self.sizes.max_num_seqs,
            max_model_len=self.sizes.max_model_len,
            stream=stream.cuda_stream if stream else None,
        )

    def torch(
        self, dtype: str, *, graphs: bool = True, folder: Path | None = None, device: str = ""
    ) -> TorchBackend:
        return TorchBackend.load(
            folder or self.student,
            device=device or str(self.device),
            dtype=getattr(torch, dtype),
            max_num_seqs=self.sizes.max_num_seqs,
            max_model_len=self.sizes.max_model_len,
            enable_cuda_graphs=graphs,
        )

    def backend(self, runtime: str, dtype: str) -> Backend:
        """Load the student in a runtime. Raises like `need_kernels`."""
        self.need_kernels(runtime, dtype)
        return self.onnx(dtype) if runtime == "onnx" else self.torch(dtype)

    def need_kernels(self, runtime: str, dtype: str) -> None:
        """Raise CheckSkippedError when `runtime` cannot run `dtype` on the device."""
        if (runtime, dtype) in NO_KERNELS[self.device.type]:
            raise CheckSkippedError(f"{runtime} has no {dtype} kernels on {self.device.type}")

    def need_cuda(self) -> None:
        """Raise CheckSkippedError on the CPU."""
        if not self.on_cuda:
            raise CheckSkippedError("needs CUDA")

    def transformers(self) -> Any:
        model = load_pretrained(self.student, getattr(torch, self.sizes.dtype))
        model.generation_config.eos_token_id = None
        return model.to(self.device)

    def tokens(self, num_rows: int, length: int) -> list[list[int]]:
        vocab_size = read_model_config(self.student).vocab_size
        ids = np.random.default_rng(0).integers(3, vocab_size, (num_rows, length))
        return [[int(token_id) for token_id in row] for row in ids]

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def time_s(self, work: Callable[[], object]) -> float:
        """Return how long `work` takes, to the end of what it queued on the device."""
        self.synchronize()
        started_s = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started_s


def count_parameters(folder: Path) -> int:
    return open_model_folder(folder, has_tokenizer=False).num_parameters


@contextmanager
def freed(bench: Bench) -> Iterator[None]:
    """Give the models of the block back to the device."""
    yield
    if bench.on_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def make_random_model(shape: str, seed: int, folder: Path) -> Path:
    """Save a Llama with random weights.

    Products keep the size of what goes in: smaller weights make all tokens alike, larger ones make
    chaos of the last bits.
    """
    hidden, intermediate, layers, heads, kv_heads, vocab_size, positions = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=1 / hidden**0.5,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones, they would be one initializer and some Identity nodes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def export_graphs(student: Path, target: Path) -> Path:
    """Write the student's graph in float32, float16 and bfloat16 under `target`."""
    for dtype in DTYPES:
        (target / dtype).mkdir(parents=True)
        (target / dtype / "config.json").write_text((student / "config.json").read_text())
    model = load_pretrained(student, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about themselves
        path = export_onnx(
            model, target / "float32", max_model_len=model.config.max_position_embeddings
        )
    save_onnx(to_half(onnx.load(path), "float16"), target / "float16")
    save_onnx(to_half(onnx.load(path), "bfloat16"), target / "bfloat16")
    return target
