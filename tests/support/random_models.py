"""Random models small enough to train and export in well under a second each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from export.graph.quantize import WeightOnly, quantize_weights
from export.graph.surgery import load_untied, save_onnx
from export.graph.trace import export_onnx
from export.teacher.examples import Example
from export.teacher.model_files import write_variant_files

VOCAB_SIZE = 97
MAX_MODEL_LEN = 160
NUM_LAYERS = 5
WINDOW = 24  # shorter than what the parity measurement reads
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _layer_types(num_layers: int) -> list[str]:
    return [("full_attention", "sliding_attention")[i % 2] for i in range(num_layers)]


# Name -> class, configuration, heads per KV head, tied, and what else the configuration has, or
# how to make it for a number of layers. Heads of 16: the least that GroupQueryAttention takes.
# "-padded": more token ids than any tokenizer here has tokens.
Settings = dict[str, Any]
ARCHITECTURES: dict[str, tuple[Any, Any, int, bool, Callable[[int], Settings]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, 2, True, lambda n: {}),
    "llama-untied": (LlamaForCausalLM, LlamaConfig, 1, False, lambda n: {}),
    "llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        2,
        True,
        lambda n: {"rope_scaling": dict(LLAMA3_ROPE)},
    ),
    "llama-biased": (
        LlamaForCausalLM,
        LlamaConfig,
        2,
        False,
        lambda n: {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 2, True, lambda n: {}),
    "qwen2-untied": (Qwen2ForCausalLM, Qwen2Config, 1, False, lambda n: {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        2,
        False,
        lambda n: {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _layer_types(n),
        },
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, 2, True, lambda n: {"head_dim": 32}),
    "qwen3-padded": (
        Qwen3ForCausalLM,
        Qwen3Config,
        1,
        False,
        lambda n: {"head_dim": 16, "vocab_size": 640},
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        2,
        False,
        lambda n: {"head_dim": 32, "sliding_window": None},
    ),
    "mistral-window": (
        MistralForCausalLM,
        MistralConfig,
        1,
        True,
        lambda n: {"sliding_window": WINDOW},
    ),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        2,
        True,
        lambda n: {"no_rope_layer_interval": 2},
    ),
    "smollm3-window": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        1,
        False,
        lambda n: {
            "no_rope_layers": [int(i % 3 != 1) for i in range(n)],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _layer_types(n),
        },
    ),
}
PLAIN = ("llama", "llama-untied", "qwen2", "qwen2-untied")


def random_model(
    architecture: str = "llama", *, num_layers: int = NUM_LAYERS, seed: int = 0
) -> Any:
    model_class, config_class, queries_per_key, is_tied, others = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 // queries_per_key,
        "max_position_embeddings": 256,
        "tie_word_embeddings": is_tied,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = model_class(config_class(**settings | others(num_layers))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # all alike they would be stored once
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def random_examples(lengths: list[tuple[int, int]], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist())

    return [Example(tokens(prompt), tokens(completion)) for prompt, completion in lengths]


@dataclass(frozen=True, slots=True)
class Exported:
    """A student's folder and its graphs by variant name, as the pipeline lays them out."""

    student_dir: Path
    variants: dict[str, Path]


def export_model(model: Any, teacher_files: Path, target: Path, **recipes: WeightOnly) -> Exported:
    student_dir = target / "student"
    variants = {name: target / name for name in ("fp32", *recipes)}
    for folder in (student_dir, *variants.values()):
        folder.mkdir()
    model.save_pretrained(student_dir)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (student_dir / name).write_bytes((teacher_files / name).read_bytes())
    export_onnx(copy.deepcopy(model), variants["fp32"], max_model_len=MAX_MODEL_LEN)
    for name, recipe in recipes.items():
        save_onnx(quantize_weights(load_untied(variants["fp32"]), recipe), variants[name])
    for folder in variants.values():
        write_variant_files(student_dir, folder, MAX_MODEL_LEN)
    return Exported(student_dir, variants)
