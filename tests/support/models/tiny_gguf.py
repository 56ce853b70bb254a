"""A GGUF file of a Llama of one layer, and the metadata of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As the tokenizer of SmolLM2, this one has a token for an empty line: only a tokenizer that
# splits digits off first uses it in front of "1.".
MERGES = ["Ċ Ċ", "H i", "Ġ +"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HIDDEN = 8


def make_vocabulary() -> tuple[list[str], list[int]]:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES), "<user>"]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 4)
    return tokens, [int(kind) for kind in [*kinds, TokenType.USER_DEFINED]]


def make_metadata(**changes: Any) -> dict[str, Any]:
    tokens, kinds = make_vocabulary()
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": kinds}
    metadata |= {"merges": MERGES, "eos_token_id": 2, "bos_token_id": 1, **changes}
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def write_tiny_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray[Any, Any]]:
    """Write a Llama of one layer, one head and 8 hidden units; return its tensors."""
    tokens, kinds = make_vocabulary()
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (2 * HIDDEN, HIDDEN), "blk.0.ffn_up": (2 * HIDDEN, HIDDEN)}
    shapes |= {"blk.0.ffn_down": (HIDDEN, 2 * HIDDEN)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
