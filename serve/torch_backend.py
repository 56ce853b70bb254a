"""A transformers model behind `serve.backend.Backend`: slot attention and packed linear layers.

The model's own code runs unchanged, except that its attention function reads and writes the slot
cache, and that on the CPU its linear layers use oneDNN's packed weights. Everything that depends
on the version of transformers is in this file.

On a CPU with bfloat16 instructions a row's logits are the same bits whatever else is in the batch,
and the same whether computed one token at a time or in one teacher-forced pass (docs/log.md). That
needs oneDNN for every matrix product, never a product of fewer than two rows (in attention:
`_MIN_QUERY_ROWS`), and a key length rounded up to `_KEY_ALIGNMENT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers import AutoModelForCausalLM as AutoModel

from serve.backend import NUM_SPARE_ROWS, ModelInfo, logit_rows
from serve.kv_cache import KVCache

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# The others (dynamic, longrope) turn by the longest sequence of the batch.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_ATTENTION = "tandem_slots"
_KEY_ALIGNMENT = 16
_MIN_QUERY_ROWS = 8


@dataclass(frozen=True, slots=True)
class _Slots:
    """Where this step's rows live in the cache, and what each new token may attend to.

    `positions` is `(B, T)`; `masks` has one per layer, additive, `(B, 1, R, L)`, where R is G*T (G
    query heads per KV head) but at least `_MIN_QUERY_ROWS`. Layers of one window share one.
    """

    cache: KVCache
    first_row: int
    positions: torch.Tensor
    masks: tuple[torch.Tensor, ...]
    is_first_prefill: bool

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `(B, H, T, D)` keys and values of the new tokens."""
        for cached, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            rows = cached[self.first_row : self.first_row + len(new)]
            if self.is_first_prefill:
                rows[:, :, : new.shape[2]] = new
            else:
                row_ids = torch.arange(len(new), device=new.device)[:, None]
                rows[row_ids, :, self.positions] = new.transpose(1, 2)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(self.first_row, self.first_row + len(self.positions))
        length = self.masks[layer].shape[-1]
        return self.cache.keys[layer][rows, :, :length], self.cache.values[layer][rows, :, :length]


def _slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    slots: _Slots,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the cache. `query` `(B, Hq, T, D)`, `key`/`value` `(B, Hkv, T, D)`.

    The query heads that share a KV head are laid out as further query positions of that head, so
    keys and values are never repeated.
    """
    batch, num_heads, num_tokens, head_dim = query.shape
    layer = module.layer_idx
    assert isinstance(layer, int)
    slots.write(layer, key, value)
    keys, values = slots.read(layer)
    folded = query.reshape(batch, keys.shape[1], -1, head_dim)
    num_rows, mask = folded.shape[2], slots.masks[layer]
    folded = nn.functional.pad(folded, (0, 0, 0, mask.shape[2] - num_rows))
    output = nn.functional.scaled_dot_product_attention(
        folded, keys, values, attn_mask=mask, scale=scaling
    )[:, :, :num_rows]
    return output.reshape(batch, num_heads, num_tokens, head_dim).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Stop transformers from building a mask: `_Slots` has it."""


AttentionInterface.register(_ATTENTION, _slot_attention)
AttentionMaskInterface.register(_ATTENTION, _no_mask)


class _PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked layout: 2 to 3 times as fast at B = 1.

    The operators are the ones that torch's inductor emits for a frozen linear layer.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        # A single row would take another kernel, with another order of additions.
        padded = rows if len(rows) > 1 else rows.expand(2, -1)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            padded, self.packed, self.bias, "none", [], ""
        )
        return output[: len(rows)].view(*x.shape[:-1], -1)


class TorchBackend:
    """See `serve.backend.Backend`. One instance serves one model from one thread."""

    def __init__(
        self, model: Any, *, device: torch.device, max_num_seqs: int, max_model_len: int
    ) -> None:
        config = model.config
        self._decoder = model.model
        self._device = device
        self._dtype: torch.dtype = model.dtype
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._windows = sliding_windows(config)
        self._num_queries_per_key = config.num_attention_heads // config.num_key_value_heads
        # One column more than the context: padding tokens write there when a row is full.
        num_columns = _round_up(max_model_len + 1)
        self.cache = KVCache(
            config.num_hidden_layers,
            (max_num_seqs + NUM_SPARE_ROWS, config.num_key_value_heads, num_columns, head_dim),
            self._dtype,
            device,
        )
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            precision=str(self._dtype).removeprefix("torch."),
            num_parameters=model.num_parameters(),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        # Log-probabilities are differences of logits: bfloat16 would round them to 1/8 nat.
        self._head = _make_linear(model.lm_head.weight.float(), model.lm_head.bias)
        if device.type == "cpu":
            _pack_linears(self._decoder)

    @classmethod
    def load(
        cls, path: Path, *, device: str, dtype: torch.dtype, max_num_seqs: int, max_model_len: int
    ) -> TorchBackend:
        """Load a transformers folder. Raises ValueError when the architecture is not supported."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_supported(config)
        if max_model_len > config.max_position_embeddings:
            raise ValueError(
                f"max_model_len {max_model_len} exceeds the {config.max_position_embeddings} "
                f"positions of {path}"
            )
        model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        return cls.take(
            model, device=device, max_num_seqs=max_num_seqs, max_model_len=max_model_len
        )

    @classmethod
    def take(
        cls, model: Any, *, device: str, max_num_seqs: int, max_model_len: int
    ) -> TorchBackend:
        """Take over a transformers model, which is of no further use by itself."""
        model.set_attn_implementation(_ATTENTION)
        return cls(
            model.eval().to(device),
            device=torch.device(device),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )

    @torch.inference_mode()
    def forward(
        self,
        first_row: int,
        new_token_ids: Sequence[Sequence[int]],
        past_lengths: Sequence[int],
        logit_indices: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        input_ids = _right_padded(new_token_ids).to(self._device)
        slots = self._slots(first_row, input_ids.shape[1], past_lengths)
        hidden = self._decoder(
            input_ids=input_ids, position_ids=slots.positions, use_cache=False, slots=slots
        ).last_hidden_state
        wanted = logit_rows(new_token_ids, logit_indices, input_ids.shape[1])
        rows = hidden.flatten(0, 1)[torch.tensor(wanted, device=self._device)]
        logits: torch.Tensor = self._head(rows.float())
        return logits

    def copy_kv(self, source_row: int, target_row: int, length: int) -> None:
        """See `Backend.copy_kv`."""
        self.cache.copy_row(source_row, target_row, length)

    def read_kv(self, row: int, start: int, stop: int) -> torch.Tensor:
        """See `Backend.read_kv`."""
        return self.cache.read(row, start, stop)

    def write_kv(self, row: int, start: int, kv: torch.Tensor) -> None:
        """See `Backend.write_kv`."""
        self.cache.write(row, start, kv)

    def _slots(self, first_row: int, num_tokens: int, past_lengths: Sequence[int]) -> _Slots:
        past = torch.tensor(past_lengths, device=self._device)[:, None]
        positions = past + torch.arange(num_tokens, device=self._device)
        positions = positions.clamp_max(self.cache.max_len - 1)
        num_keys = min(_round_up(max(past_lengths) + num_tokens), self.cache.max_len)
        masks = {w: self._mask(positions, num_keys, w) for w in set(self._windows)}
        return _Slots(
            self.cache,
            first_row,
            positions,
            tuple(masks[window] for window in self._windows),
            is_first_prefill=not any(past_lengths),
        )

    def _mask(self, positions: torch.Tensor, num_keys: int, window: int | None) -> torch.Tensor:
        """See `_Slots`: every token sees the `window` newest keys, its own included, or all."""
        age = positions[..., None] - torch.arange(num_keys, device=self._device)
        is_hidden = age < 0 if window is None else (age < 0) | (age >= window)
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype, device=self._device)
        mask = mask.masked_fill_(is_hidden, -torch.inf).repeat(1, self._num_queries_per_key, 1)
        num_padding_rows = max(_MIN_QUERY_ROWS - mask.shape[1], 0)
        return nn.functional.pad(mask, (0, 0, 0, num_padding_rows))[:, None]


def check_supported(config: Any) -> None:
    """Raise ValueError unless a row's logits depend on its own tokens and positions alone."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise ValueError(
            f"model type {config.model_type!r}: layer_types has {min(other)!r}; "
            f"supported are {', '.join(sorted(_LAYER_TYPES))}"
        )
    scaling = getattr(config, "rope_scaling", None) or {}
    rope_type = "mrope" if "mrope_section" in scaling else scaling.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"model type {config.model_type!r}: rope_scaling is of type {rope_type!r}; "
            f"supported are {', '.join(_ROPE_TYPES)}"
        )


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Return how many keys a token sees in each layer, its own included; None: all.

    As transformers' masks have it: Mistral's window holds for all layers, the others' for those
    that `layer_types` names.
    """
    num_layers: int = config.num_hidden_layers
    if config.model_type == "mistral":
        is_sliding = [True] * num_layers
    else:
        layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
        is_sliding = [layer_type == "sliding_attention" for layer_type in layer_types]
    return tuple(config.sliding_window if sliding else None for sliding in is_sliding)


def _right_padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _round_up(length: int) -> int:
    return -(-length // _KEY_ALIGNMENT) * _KEY_ALIGNMENT


def _pack_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _make_linear(child.weight, child.bias))
        else:
            _pack_linears(child)


def _make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return _PackedLinear(weight, bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
