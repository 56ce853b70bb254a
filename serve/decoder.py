"""A Llama-like decoder as few tensor operations: at batch 1 each one costs as much as its work.

Weights are what `serve.torch_backend` takes out of a transformers model; rounding is transformers'
own. How tokens attend to a cache is left to `Attention`. On a CPU with bfloat16 instructions a row
gets the same bits in every batch of at least `MIN_CPU_ROWS` rows (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]

# A product with a single row takes another kernel, with another order of additions.
MIN_CPU_ROWS = 2


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How a packed projection divides into heads: queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_rotated(self) -> int:
        """Queries and keys."""
        return self.num_heads + self.num_kv_heads

    @property
    def num_queries_per_key(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. `head_norm` takes `(N, num_rotated, head_dim)`."""

    input_norm: Norm
    qkv: Linear
    head_norm: Norm | None
    has_rope: bool
    window: int | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Decoder:
    """All weights of a model. `rotary` is `(positions, 2, head_dim)`: cosines, signed sines."""

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Linear
    rotary: Tensor
    shape: HeadShape

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(layer.window for layer in self.layers)


# `attention(layer, heads)`: store the keys and values in `heads` `(N, all heads, head_dim)` and
# return what its queries see, `(N, num_heads * head_dim)`. The N of the batch may be smaller than
# that of `heads`: a lone row is computed twice (`MIN_CPU_ROWS`).
Attention = Callable[[int, Tensor], Tensor]


def decode_hidden(
    decoder: Decoder, token_ids: Tensor, positions: Tensor, attention: Attention
) -> Tensor:
    """Return the hidden states `(N, hidden)` in front of the last norm of `(N,)` tokens."""
    hidden = F.embedding(_at_least_two(token_ids), decoder.embedding)
    cos, sin = decoder.rotary[positions][:, :, None].unbind(1)
    for index, layer in enumerate(decoder.layers):
        heads = layer.qkv(layer.input_norm(hidden))
        heads = heads.view(len(hidden), -1, decoder.shape.head_dim)
        rotated = heads[:, : decoder.shape.num_rotated]
        if layer.head_norm is not None:
            rotated.copy_(layer.head_norm(rotated))
        if layer.has_rope:
            rotate(rotated, cos, sin)
        attended = attention(index, heads)
        hidden = layer.output(attended.expand(len(hidden), -1)).add_(hidden)
        gate_up = layer.gate_up(layer.mlp_norm(hidden))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = layer.down(F.silu(gate).mul_(up)).add_(hidden)
    return hidden[: len(token_ids)]


def next_token_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return `(N, V)` float32: bfloat16 would round log-probabilities to 1/8 nat."""
    normed = decoder.final_norm(_at_least_two(hidden))
    return decoder.head(normed.float())[: len(hidden)]


def make_norm(weight: Tensor, eps: float) -> Norm:
    """Return x -> x / rms(x) * weight over the last dimension, rounded before the weight comes in.

    Zhang and Sennrich 2019, equation 4, with `eps` added to the mean square.
    """
    weight = weight.detach()
    if weight.is_cuda:
        return lambda x: F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    smallest = torch.tensor(eps)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(smallest, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(weight)

    return norm


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `(N, heads, head_dim)` in place by the angles of `cos` and `sin`, `(N, 1, head_dim)`.

    Su et al. 2021, equation 34, with the halves of a head as pairs. The sign of its rotated half
    is in `sin`: see `rotary_table`.
    """
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(swapped, sin)


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """Return `Decoder.rotary` of cosines and sines `(positions, head_dim)`."""
    half = sin.shape[-1] // 2
    return torch.stack((cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)), dim=1)


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return x -> x W^T + b for `(N, in)` inputs; on the CPU N is at least `MIN_CPU_ROWS`.

    There the weight is copied into oneDNN's blocked layout: 2 to 3 times as fast for few rows. The
    operators are the ones that torch's inductor emits for a frozen linear layer.
    """
    weight = weight.detach()
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        output: Tensor = multiply(x, packed, bias, "none", [], "")
        return output

    return linear


def _at_least_two(rows: Tensor) -> Tensor:
    if len(rows) >= MIN_CPU_ROWS or rows.is_cuda:
        return rows
    return rows.expand(MIN_CPU_ROWS, *rows.shape[1:])
