"""A transformers decoder as an ONNX graph that onnxruntime runs fast: about 11 nodes per layer.

`export.graph.architecture` says which decoders, and how many nodes.

optimum's exporter does the tracing and names the inputs and outputs as the ecosystem does. Before
it runs, each attention block is replaced by one that is a single `com.microsoft` operator,
GroupQueryAttention (packed QKV projection, rotary embedding inside). Afterwards onnxruntime's own
fusions join residual additions and RMS norms, and the head learns to skip rows nobody reads.

The file is `model.onnx` with its weights in `model.onnx.data`. Inputs: `input_ids`,
`attention_mask`, `past_key_values.N.key|value`; outputs: `logits`, `present.N.key|value`. One more
input is optional and unknown to other tools: `logit_rows` (int64, `(N,)`), indices into the
flattened `(B * T)` positions; when it is fed and not empty, `logits` is `(1, N, V)` of those
positions only.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.onnx import symbolic_helper
from torch.onnx.operators import shape_as_tensor
from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic
from transformers import AttentionMaskInterface

from export.graph.architecture import check_exportable, expected_num_nodes
from export.graph.surgery import OPSET, operate, save_onnx
from serve.models.architectures import sliding_windows

_MASK = "tandem_gqa"


def export_onnx(model: Any, target_dir: Path, *, max_model_len: int) -> Path:
    """Write a float32 decoder as `target_dir/model.onnx` and return its path.

    `max_model_len` is how many positions the rotary tables cover. The model is changed in place
    and of no further use. ExportError when the graph would not compute what the model does.
    """
    assert model.dtype == torch.float32, model.dtype
    check_exportable(model.config)
    max_nodes = expected_num_nodes(model)
    with tempfile.TemporaryDirectory(dir=target_dir) as scratch:
        traced = Path(scratch) / "model.onnx"
        _trace(model, traced, max_model_len)
        graph_model = onnx.load(traced)
    is_tied = model.config.tie_word_embeddings
    return save_onnx(operate(graph_model, max_nodes, is_tied=is_tied), target_dir)


# -- attention as one operator --------------------------------------------------------------------


@torch.library.custom_op("tandem::group_query_attention", mutates_args=())
def _group_query_attention(
    qkv: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    scale: float,
    do_rotary: bool,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes only: the tracer needs outputs to follow, onnxruntime computes them.

    `qkv` is `(B, T, (Hq + 2 Hkv) D)`, the pasts `(B, Hkv, P, D)`, `cos` and `sin` `(positions,
    D / 2)`; returns the attention output `(B, T, Hq D)` and the presents `(B, Hkv, P + T, D)`.
    `local_window_size` is how many keys a token sees, its own included; -1: all.
    """
    batch, num_tokens, _ = qkv.shape
    new = qkv.new_zeros(batch, kv_num_heads, num_tokens, head_dim)
    return (
        qkv[..., : num_heads * head_dim].clone(),
        torch.cat([past_key, new], dim=2),
        torch.cat([past_value, new], dim=2),
    )


@symbolic_helper.parse_args(*"vvvvvvviiifii")
def _group_query_attention_symbolic(
    g: Any,
    qkv: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    scale: float,
    do_rotary: int,
    local_window_size: int,
) -> Any:
    empty = symbolic_helper._optional_input_placeholder_tensor(g)
    rotary_tables = (cos, sin) if do_rotary else ()
    output, key, value = g.op(
        "com.microsoft::GroupQueryAttention",
        qkv, empty, empty, past_key, past_value, seqlens_k, total_sequence_length, *rotary_tables,
        num_heads_i=num_heads,
        kv_num_heads_i=kv_num_heads,
        scale_f=scale,
        do_rotary_i=do_rotary,
        local_window_size_i=local_window_size,
        rotary_interleaved_i=0,
        outputs=3,
    )  # fmt: skip
    # Shape inference does not know the operator.
    output.setType(past_key.type().with_sizes([None, None, num_heads * head_dim]))
    for present in (key, value):
        present.setType(past_key.type().with_sizes([None, kv_num_heads, None, head_dim]))
    return output, key, value


@torch.library.custom_op("tandem::normalize_heads", mutates_args=())
def _normalize_heads(
    qkv: torch.Tensor, weight: torch.Tensor, kv_num_heads: int, epsilon: float
) -> torch.Tensor:
    """Shapes only: each head of Q and K in `qkv` divided by its RMS, times `(Hq + Hkv, D)`."""
    return qkv.clone()


@symbolic_helper.parse_args("v", "v", "i", "f")
def _normalize_heads_symbolic(
    g: Any, qkv: Any, weight: Any, kv_num_heads: int, epsilon: float
) -> Any:
    """One norm for all heads of Q and K, whose scale differs from head to head.

    It is spelled out, since torch knows no such operator; `export.graph.surgery` makes one of it.
    """
    num_heads, head_dim = symbolic_helper._get_tensor_sizes(weight)
    qk_size = num_heads * head_dim

    def constant(value: float | list[int]) -> Any:
        return g.op("Constant", value_t=torch.tensor(value))

    sizes = constant([qk_size, kv_num_heads * head_dim])
    qk, value = g.op("Split", qkv, sizes, axis_i=2, outputs=2)
    heads = g.op("Reshape", qk, constant([0, -1, num_heads, head_dim]))
    squares = g.op("ReduceMean", g.op("Pow", heads, constant(2.0)), constant([-1]), keepdims_i=1)
    rms = g.op("Sqrt", g.op("Add", squares, constant(epsilon)))
    normalized = g.op("Mul", weight, g.op("Mul", heads, g.op("Reciprocal", rms)))
    flat = g.op("Reshape", normalized, constant([0, -1, qk_size]))
    packed = g.op("Concat", flat, value, axis_i=2)
    packed.setType(qkv.type())
    return packed


class _FusedAttention(nn.Module):
    """Stands in for a Llama-like attention block: packed projection, one operator, projection."""

    def __init__(
        self, attention: Any, cos: torch.Tensor, sin: torch.Tensor, window: int | None
    ) -> None:
        super().__init__()
        config = attention.config
        self.layer_idx: int = attention.layer_idx
        self.num_heads: int = config.num_attention_heads
        self.kv_num_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.has_rope = bool(getattr(attention, "use_rope", True))
        self.local_window_size = -1 if window is None else window
        self.qkv_proj = _packed([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        self.head_norm = _HeadNorm(attention) if config.model_type == "qwen3" else nn.Identity()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        seqlens_k, total_sequence_length = attention_mask
        layer = past_key_values.layers[self.layer_idx]
        output, layer.keys, layer.values = _group_query_attention(
            self.head_norm(self.qkv_proj(hidden_states)), layer.keys, layer.values,
            seqlens_k, total_sequence_length, self.cos, self.sin,
            self.num_heads, self.kv_num_heads, self.head_dim, self.scale,
            self.has_rope, self.local_window_size,
        )  # fmt: skip
        return self.o_proj(output), None


class _HeadNorm(nn.Module):
    """Qwen3's norms of the heads of Q and K, in front of the rotary embedding, as one."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        config = attention.config
        self.kv_num_heads: int = config.num_key_value_heads
        self.epsilon: float = config.rms_norm_eps
        query, key = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        rows = [query] * config.num_attention_heads + [key] * self.kv_num_heads
        self.weight = nn.Parameter(torch.stack(rows), requires_grad=False)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = _normalize_heads(
            qkv, self.weight, self.kv_num_heads, self.epsilon
        )
        return normalized


class _PlainRMSNorm(nn.Module):
    """An RMS norm without the casts of transformers: in float32 they do nothing but stop fusion."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: torch.Tensor = norm.weight
        self.epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (x * scale)


def _packed(linears: list[nn.Linear]) -> nn.Linear:
    """Return one linear layer that computes all of `linears` side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases))
    packed.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        assert len(biases) == len(linears), "all of Q, K and V have a bias, or none"
        packed.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=False)
    return packed


def _sequence_lengths(
    *_: Any, attention_mask: torch.Tensor, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of a mask: what GroupQueryAttention wants, derived once for all layers.

    Last position of each row `(B,)` and the mask's width `()`, both int32. transformers casts the
    mask to bool on its way here; `_derive_lengths_from_mask` takes that out again.
    """
    last_positions = (attention_mask.to(torch.int64).sum(1) - 1).to(torch.int32)
    width = shape_as_tensor(attention_mask)[1].to(torch.int32)
    return last_positions, width


# -- tracing --------------------------------------------------------------------------------------


def _trace(model: Any, target: Path, max_model_len: int) -> None:
    from optimum.exporters.onnx import export as optimum_export
    from optimum.exporters.tasks import TasksManager

    _replace_blocks(model, max_model_len)
    make_config = TasksManager.get_exporter_config_constructor(
        "onnx",
        library_name="transformers",
        model_type=model.config.model_type,
        task="text-generation-with-past",
    )
    with _registered_symbolics(), warnings.catch_warnings():
        # The tracer warns about every Python branch in transformers; the parity gate decides.
        warnings.simplefilter("ignore")
        optimum_export(
            model,
            make_config(model.config, use_past=True, use_past_in_inputs=True),
            target,
            opset=OPSET,
            do_constant_folding=True,
        )


def _replace_blocks(model: Any, max_model_len: int) -> None:
    AttentionMaskInterface.register(_MASK, _sequence_lengths)
    model.config._attn_implementation = _MASK
    decoder = model.model
    positions = torch.arange(max_model_len)[None]
    cos, sin = decoder.rotary_emb(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    windows = sliding_windows(model.config)
    for layer, window in zip(decoder.layers, windows, strict=True):
        layer.self_attn = _FusedAttention(layer.self_attn, cos, sin, window)
        layer.input_layernorm = _PlainRMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = _PlainRMSNorm(layer.post_attention_layernorm)
    decoder.norm = _PlainRMSNorm(decoder.norm)


@contextlib.contextmanager
def _registered_symbolics() -> Iterator[None]:
    symbolics: dict[str, Callable[..., Any]] = {
        "tandem::group_query_attention": _group_query_attention_symbolic,
        "tandem::normalize_heads": _normalize_heads_symbolic,
    }
    for name, symbolic in symbolics.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in symbolics:
            unregister_custom_op_symbolic(name, OPSET)
