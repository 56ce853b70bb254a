"""The bundle's student as a GGUF file for llama.cpp: the same weights, quantized to Q8_0.

Without a tokenizer: the benchmark hands over token ids.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bundle.model_config import ModelConfig
from bundle.model_folder import open_model_folder

Array = NDArray[np.float32]

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_TENSORS = {"embed_tokens": "token_embd", "norm": "output_norm"}


def write_gguf(student: Path, target: Path) -> None:
    """Convert a Llama with tied embeddings; matrices become Q8_0, norms stay float32.

    Raises ValueError for any other architecture.
    """
    config = open_model_folder(student, has_tokenizer=False).config
    if config.model_type != "llama" or not config.tie_word_embeddings:
        raise ValueError(f"{student} is no Llama with tied embeddings: {config.model_type}")
    writer = gguf.GGUFWriter(target, "llama")
    _write_config(writer, config)
    for name, tensor in load_file(student / "model.safetensors").items():
        _write_tensor(writer, gguf_name(name), _rotary_order(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    inner = name.removeprefix("model.").removesuffix(".weight")
    if not inner.startswith("layers."):
        return f"{_OTHER_TENSORS[inner]}.weight"
    _, layer, part = inner.split(".", 2)
    return f"blk.{layer}.{_LAYER_TENSORS[part]}.weight"


def _write_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.settings["rms_norm_eps"])
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("no_vocab")


def _rotary_order(name: str, tensor: Array, config: ModelConfig) -> Array:
    """Interleave the halves of each head's Q and K rows: ggml rotates neighbours, not halves.

    Source: `permute` of llama.cpp's convert_hf_to_gguf.py.
    """
    num_heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if num_heads is None:
        return tensor
    halves = tensor.reshape(num_heads, 2, -1, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, tensor: Array) -> None:
    tensor = tensor.astype(np.float32)
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
