"""A Llama-like decoder as few tensor operations: at batch 1 each one costs as much as its work.

Weights are what `serve.models.torch_backend` takes out of a transformers model; rounding is
transformers' own. How tokens attend to a cache is left to `Attention`.

On the CPU a row gets the same bits in every batch. Between the products each number is a
correctly rounded sum, product or quotient, so that it does not matter whether a vector instruction
computes it or the loop over the rest; of the exponential torch has one for both. That a product
does not depend on how many rows it has, from `MIN_CPU_ROWS` on, is found out at the start
(`serve.models.batch_invariance`); where it does, `Decoder.row_group` makes all products alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.models.architectures import HeadShape

Linear = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]

# A product with a single row takes another kernel, with another order of additions.
MIN_CPU_ROWS = 2
# Numbers in the largest vector that torch's loops take at once, unrolled: 4 registers of 64 bytes.
_MAX_VECTOR = 4 * 32


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
    """All weights of a model. `rotary` is `(positions, 2, head_dim)`: cosines, signed sines.

    Products take `row_group` rows at a time, the last ones filled up; None: all rows at once.
    """

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Linear
    rotary: Tensor
    shape: HeadShape
    row_group: int | None = None

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
    multiply = partial(in_row_groups, decoder.row_group)
    cos, sin = decoder.rotary[positions][:, :, None].unbind(1)
    for index, layer in enumerate(decoder.layers):
        heads = multiply(layer.qkv, layer.input_norm(hidden))
        heads = heads.view(len(hidden), -1, decoder.shape.head_dim)
        rotated = heads[:, : decoder.shape.num_rotated]
        if layer.head_norm is not None:
            rotated.copy_(layer.head_norm(rotated))
        if layer.has_rope:
            rotate(rotated, cos, sin)
        attended = attention(index, heads)
        hidden = multiply(layer.output, attended.expand(len(hidden), -1)).add_(hidden)
        gate_up = multiply(layer.gate_up, layer.mlp_norm(hidden))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = multiply(layer.down, silu(gate).mul_(up)).add_(hidden)
    return hidden[: len(token_ids)]


def next_token_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return `(N, V)` float32: bfloat16 would round log-probabilities to 1/8 nat."""
    normed = decoder.final_norm(_at_least_two(hidden))
    return in_row_groups(decoder.row_group, decoder.head, normed.float())[: len(hidden)]


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)) of `(N, width)`, computed in float32 and rounded once.

    On the CPU torch's own gives other bits where a vector is not full, so it is taken only where
    none is: torch divides the numbers evenly between its threads.
    """
    if x.is_cuda or x.shape[-1] % _full_vectors(torch.get_num_threads()) == 0:
        return F.silu(x)
    return (x / x.neg().float().exp_().add_(1)).to(x.dtype)


@cache
def _full_vectors(num_threads: int) -> int:
    """Return of what a width must be a multiple for every share of so many threads to be even."""
    return _MAX_VECTOR * math.lcm(*range(1, num_threads + 1))


def in_row_groups(row_group: int | None, linear: Linear, rows: Tensor) -> Tensor:
    """Return the product with `rows` `(N, in)`, `row_group` of them at a time or all at once."""
    if row_group is None or rows.is_cuda:
        return linear(rows)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % row_group))
    return torch.cat([linear(group) for group in padded.split(row_group)])[: len(rows)]


def make_norm(weight: Tensor, eps: float) -> Norm:
    """Return x -> x / rms(x) * weight over the last dimension, rounded before the weight comes in.

    Zhang and Sennrich 2019, equation 4, with `eps` added to the mean square.
    """
    weight = weight.detach()
    if weight.is_cuda:
        return lambda x: F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)

    def norm(x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale).to(x.dtype).mul_(weight)

    return norm


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `(N, heads, head_dim)` in place by the angles of `cos` and `sin`, `(N, 1, head_dim)`.

    Su et al. 2021, equation 34, with the halves of a head as pairs. The sign of its rotated half
    is in `sin`: see `rotary_table`.
    """
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).add_(swapped.mul_(sin))


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """Return `Decoder.rotary` of cosines and sines `(positions, head_dim)`."""
    half = sin.shape[-1] // 2
    return torch.stack((cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)), dim=1)


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return x -> x W^T + b for `(N, in)` inputs; on the CPU N is at least `MIN_CPU_ROWS`.

    There the weight is copied into oneDNN's blocked layout: 2 to 3 times as fast for few rows. The
    operators are the ones that torch's inductor emits for a frozen linear layer. A CPU without
    instructions for bfloat16 or float16 has the same numbers in float32, and rounds the sums.
    """
    weight = weight.detach()
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight, bias=bias)
    is_widened = not has_products(weight.dtype)
    if is_widened:
        weight, bias = weight.float(), None if bias is None else bias.float()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        output: Tensor = multiply(x, packed, bias, "none", [], "")
        return output

    if not is_widened:
        return linear
    return lambda x: linear(x.float()).to(x.dtype)


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this type, by oneDNN."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())


def _at_least_two(rows: Tensor) -> Tensor:
    if len(rows) >= MIN_CPU_ROWS or rows.is_cuda:
        return rows
    return rows.expand(MIN_CPU_ROWS, *rows.shape[1:])
