"""A transformers model behind `serve.models.backend.Backend`.

Transformers reads the model and knows its rotary angles; the steps are `serve.models.llama`'s, and
how tokens attend is `serve.models.block_attention` on the CPU and `serve.models.attention` on
CUDA. Everything that depends on the version of transformers is in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bundle.model_folder import open_model_folder
from serve.models.architectures import check_supported, head_shape, sliding_windows
from serve.models.attention import (
    KEY_ALIGNMENT,
    QUERY_ALIGNMENT,
    ManyTokenAttention,
    OneTokenAttention,
    SlotCache,
    round_up,
)
from serve.models.backend import ModelInfo, logit_rows
from serve.models.batch_invariance import choose_way
from serve.models.block_attention import KEY_BLOCK, QUERY_GROUPS, BlockAttention
from serve.models.cuda_graphs import DecodeGraphs, cuda_capture
from serve.models.kv_cache import CachedRows, KVCache
from serve.models.llama import (
    Attention,
    Decoder,
    DecoderLayer,
    Norm,
    decode_hidden,
    make_linear,
    make_norm,
    next_token_logits,
    rotary_table,
)
from serve.models.pretrained import load_pretrained
from serve.text.real_tokens import ABSENT_LOGIT, EVERY_ROW, RealTokens

# Ways of computing on the CPU, fastest first: the size of a query group, and the rows of a product
# (`decoder.Decoder.row_group`). In the last one every product has one shape.
_WAYS: tuple[tuple[int, int | None], ...] = (
    *((group, None) for group in QUERY_GROUPS),
    (QUERY_GROUPS[-1], 16),
)


class TorchBackend(CachedRows):
    """See `serve.models.backend.Backend`. One instance serves one model from one thread."""

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        enable_cuda_graphs: bool = True,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> None:
        config = model.config
        shape = head_shape(config)
        num_rows = len(model.lm_head.weight)
        real_tokens = real_tokens.within(num_rows)
        # One column more than the context: padding tokens write there when a row is full.
        num_columns = round_up(max_model_len + 1, KEY_BLOCK)
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            precision=str(model.dtype).removeprefix("torch."),
            num_parameters=model.num_parameters(),
            vocab_size=real_tokens.num_tokens,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self.cache = KVCache(
            config.num_hidden_layers,
            (self.info.rows.num_rows, shape.num_kv_heads, num_columns, shape.head_dim),
            model.dtype,
            device,
        )
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._query_group = QUERY_GROUPS[0]
        self._slots = SlotCache(self.cache)
        self._decoder = take_decoder(model, num_columns, real_tokens)
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda" and enable_cuda_graphs:
            self._graphs = DecodeGraphs(
                self.decode, cuda_capture(device), self.info, max_num_keys=num_columns
            )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str,
        dtype: torch.dtype,
        max_num_seqs: int,
        max_model_len: int,
        enable_cuda_graphs: bool = True,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> TorchBackend:
        """Load the model of a folder.

        Logits are those of `real_tokens`, of all rows of the head by default.

        Raises ModelFolderError as from `bundle.model_folder.open_model_folder`, and ValueError
        when the model has fewer positions than `max_model_len`.
        """
        folder = open_model_folder(path, has_tokenizer=False)
        positions = folder.config.max_position_embeddings
        if max_model_len > positions:
            raise ValueError(
                f"max_model_len {max_model_len} exceeds the {positions} positions of {path}"
            )
        return cls.take(
            load_pretrained(folder, dtype),
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enable_cuda_graphs=enable_cuda_graphs,
            real_tokens=real_tokens,
        )

    @classmethod
    def take(
        cls,
        model: Any,
        *,
        device: str,
        max_num_seqs: int,
        max_model_len: int,
        enable_cuda_graphs: bool = True,
        real_tokens: RealTokens = EVERY_ROW,
    ) -> TorchBackend:
        """Take over a transformers model, whose weights are gone afterwards; see `load`.

        Raises ValueError when the architecture is not supported.
        """
        check_supported(model.config)
        return cls(
            model.to(device),
            device=torch.device(device),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enable_cuda_graphs=enable_cuda_graphs,
            real_tokens=real_tokens,
        )

    @torch.inference_mode()
    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """See `Backend.forward`."""
        is_step = logit_indices is None and all(len(ids) == 1 for ids in new_token_ids)
        if is_step and self._on_cuda:
            return self._forward_one(first_row, [ids[0] for ids in new_token_ids], past_lengths)
        token_ids = _right_padded(new_token_ids, QUERY_ALIGNMENT if self._on_cuda else 1)
        token_ids = token_ids.to(self._device)
        num_tokens = token_ids.shape[1]
        past = torch.tensor(past_lengths, device=self._device)[:, None]
        positions = past + torch.arange(num_tokens, device=self._device)
        positions = positions.clamp_max(self.cache.max_len - 1)
        attention = self._attention(
            first_row, positions, past_lengths, [len(ids) for ids in new_token_ids]
        )
        hidden = decode_hidden(self._decoder, token_ids.flatten(), positions.flatten(), attention)
        wanted = logit_rows(new_token_ids, logit_indices, num_tokens)
        return next_token_logits(self._decoder, hidden[torch.tensor(wanted, device=self._device)])

    def _attention(
        self,
        first_row: int,
        positions: Tensor,
        past_lengths: Sequence[int],
        num_new: Sequence[int],
    ) -> Attention:
        shape, windows = self._decoder.shape, self._decoder.windows
        new = (first_row, positions, past_lengths)
        if self._on_cuda:
            return ManyTokenAttention(self._slots, shape, windows, *new)
        return BlockAttention(self._slots, shape, windows, *new, num_new, self._query_group)

    def _forward_one(
        self, first_row: int, token_ids: Sequence[int], past_lengths: Sequence[int]
    ) -> Tensor:
        if self._graphs is not None and first_row == 0:
            return self._graphs.decode(token_ids, past_lengths)
        num_keys = round_up(max(past_lengths) + 1, KEY_ALIGNMENT)
        tensors = torch.tensor([token_ids, past_lengths], device=self._device)
        return self.decode(first_row, tensors[0], tensors[1], num_keys)

    def decode(self, first_row: int, token_ids: Tensor, positions: Tensor, num_keys: int) -> Tensor:
        """Run one token `(B,)` per row at `positions` `(B,)` over `num_keys` columns; on CUDA.

        This is what a CUDA graph captures.
        """
        decoder = self._decoder
        attention = OneTokenAttention(
            self._slots, decoder.shape, decoder.windows, first_row, positions, num_keys
        )
        hidden = decode_hidden(decoder, token_ids, positions, attention)
        return next_token_logits(decoder, hidden)

    def choose_kernels(self) -> None:
        """See `Backend.choose_kernels`."""
        if self._on_cuda:
            return
        holds = choose_way(self, _WAYS, self._take_way)
        self.info = replace(self.info, batch_invariant=holds)

    def _take_way(self, way: tuple[int, int | None]) -> None:
        self._query_group, row_group = way
        self._decoder = replace(self._decoder, row_group=row_group)

    def prepare(self) -> None:
        """See `Backend.prepare`: there is nothing to do, CUDA graphs are captured when needed."""


def take_decoder(model: Any, num_positions: int, real_tokens: RealTokens) -> Decoder:
    """Take the weights out of a transformers model, layer by layer, and leave it without them."""
    decoder, config = model.model, model.config
    windows = sliding_windows(config)
    return Decoder(
        embedding=decoder.embed_tokens.weight.detach(),
        layers=tuple(
            _take_layer(layer, config.rms_norm_eps, window)
            for layer, window in zip(decoder.layers, windows, strict=True)
        ),
        final_norm=make_norm(decoder.norm.weight, config.rms_norm_eps),
        head=make_linear(*_head_of(model.lm_head, real_tokens)),
        rotary=_rotary(model, num_positions),
        shape=head_shape(config),
    )


def _take_layer(layer: Any, eps: float, window: int | None) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    taken = DecoderLayer(
        input_norm=make_norm(layer.input_layernorm.weight, eps),
        qkv=make_linear(*_stacked(attention.q_proj, attention.k_proj, attention.v_proj)),
        head_norm=_head_norm(attention, eps),
        has_rope=bool(getattr(attention, "use_rope", True)),
        window=window,
        output=make_linear(*_stacked(attention.o_proj)),
        mlp_norm=make_norm(layer.post_attention_layernorm.weight, eps),
        gate_up=make_linear(*_stacked(mlp.gate_proj, mlp.up_proj)),
        down=make_linear(*_stacked(mlp.down_proj)),
    )
    layer.to("meta")  # else every weight would be in memory twice
    return taken


def _head_of(lm_head: nn.Linear, real_tokens: RealTokens) -> tuple[Tensor, Tensor | None]:
    """Return float32 weight and bias of the rows that are tokens' (`serve.text.real_tokens`)."""
    weight = lm_head.weight.detach()[: real_tokens.num_tokens].float()
    bias = None
    if lm_head.bias is not None:
        bias = lm_head.bias.detach()[: real_tokens.num_tokens].float()
    if real_tokens.missing_ids:
        missing = torch.tensor(real_tokens.missing_ids, device=weight.device)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        weight = weight.index_fill(0, missing, 0.0)
        bias = bias.index_fill(0, missing, ABSENT_LOGIT)
    return weight, bias


def _stacked(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of layers with one input as one layer's."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _head_norm(attention: Any, eps: float) -> Norm | None:
    """Return Qwen3's norm of queries and keys, one for all their heads."""
    if getattr(attention, "q_norm", None) is None:
        return None
    head_dim = attention.head_dim
    weights = [
        norm.weight.expand(projection.out_features // head_dim, -1)
        for norm, projection in (
            (attention.q_norm, attention.q_proj),
            (attention.k_norm, attention.k_proj),
        )
    ]
    return make_norm(torch.cat(weights), eps)


def _rotary(model: Any, num_positions: int) -> Tensor:
    # A new module: a model that was cast to bfloat16 has rounded frequencies.
    rotary = type(model.model.rotary_emb)(config=model.config)
    cos, sin = rotary(torch.empty(0, dtype=model.dtype), torch.arange(num_positions)[None])
    return rotary_table(cos[0], sin[0]).to(model.lm_head.weight.device)


def _right_padded(rows: Sequence[Sequence[int]], multiple: int) -> Tensor:
    width = round_up(max(map(len, rows)), multiple)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
