"""What the check at the start finds, and what a backend does about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from serve.models.batch_invariance import choose_way, is_batch_invariant
from serve.models.torch_backend import TorchBackend

# Widths that fill no vector, and heads of a size that a query group of 4 may be too small for.
SIZES: dict[str, dict[str, int]] = {
    "odd": {"hidden_size": 84, "intermediate_size": 101, "num_attention_heads": 7, "head_dim": 12},
    "wide": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 128},
}


def load(name: str, dtype: torch.dtype, max_num_seqs: int = 16) -> TorchBackend:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.1,
        **SIZES[name],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    limits = {"max_num_seqs": max_num_seqs, "max_model_len": 1950}
    return TorchBackend.take(model.eval(), device="cpu", **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_torch_has_a_way_that_holds_on_this_machine(name: str, dtype: torch.dtype) -> None:
    backend = load(name, dtype)
    backend.choose_kernels()
    assert backend.info.batch_invariant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_sixteen_sequences_have_the_bits_of_each_alone(
    dtype: torch.dtype, num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        backend = load("odd", dtype)
        backend.choose_kernels()
        lengths = [10, 1900, *range(20, 300, 20)]
        texts = [torch.randint(120, (n + 1,)).tolist() for n in lengths]
        alone, kvs = [], []
        for text in texts:
            backend.forward(0, [text[:-1]], [0])
            kvs.append(backend.read_kv(0, 0, len(text) - 1))
            alone.append(backend.forward(0, [text[-1:]], [len(text) - 1])[0].clone())
        for row, kv in enumerate(kvs):
            backend.write_kv(row, 0, kv)
        together = backend.forward(0, [text[-1:] for text in texts], lengths)
        assert torch.equal(together, torch.stack(alone))
    finally:
        torch.set_num_threads(before)


class Leaking(TorchBackend):
    """A backend in which something of the batch reaches the logits, on the calls of `kind`."""

    leaks_into: str

    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        logits = super().forward(first_row, new_token_ids, past_lengths, logit_indices)
        kinds = {
            "": False,
            "prefill": not any(past_lengths) and len(new_token_ids) > 1,
            "step": all(past_lengths) and len(new_token_ids) == 13,
            "chunk": all(past_lengths) and len(new_token_ids[0]) > 1,
        }
        if kinds[self.leaks_into]:
            logits = logits.clone()
            logits[-1, 3] = torch.nextafter(logits[-1, 3], torch.tensor(1e9))
        return logits


def leaking(kind: str) -> Leaking:
    backend: Any = load("odd", torch.float32)
    backend.choose_kernels()
    backend.__class__ = Leaking
    backend.leaks_into = kind
    return cast(Leaking, backend)


@pytest.mark.parametrize("leaks_into", ["prefill", "step", "chunk"])
def test_is_batch_invariant_with_one_bit_changed_says_no(leaks_into: str) -> None:
    assert is_batch_invariant(leaking(""))
    assert not is_batch_invariant(leaking(leaks_into))


@pytest.mark.parametrize(
    ("kinds", "taken", "holds"),
    [(["step", "chunk", ""], [0, 1, 2], True), (["step", "chunk"], [0, 1, 0], False)],
)
def test_choose_way_takes_the_first_that_holds_else_the_first_of_all(
    kinds: list[str], taken: list[int], holds: bool
) -> None:
    backend, tried = leaking("step"), []

    def take(way: int) -> None:
        tried.append(way)
        backend.leaks_into = kinds[way]

    assert choose_way(backend, range(len(kinds)), take) is holds
    assert tried == taken


@pytest.mark.parametrize("max_model_len", [2, 3, 100])
def test_check_fits_into_every_context(max_model_len: int) -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=50, num_hidden_layers=1, num_key_value_heads=1, **SIZES["odd"])
    )
    limits = {"max_num_seqs": 1, "max_model_len": max_model_len}
    assert is_batch_invariant(TorchBackend.take(model.eval(), device="cpu", **limits))
