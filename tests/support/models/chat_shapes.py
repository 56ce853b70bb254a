"""Folders with tokenizer and chat template of the same structure as published models'.

The templates in `chat_templates/` have the constructs and the whitespace control of the real ones,
with shorter texts. The tokenizers are trained on these, in the pipelines of the real ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEMPLATES = Path(__file__).parent / "chat_templates"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = ["Good morning, what is 12 + 30? It is 42. Caf\u00e9 \u4f60\u597d", "a  b   c\n\n\nd"]


@dataclass(frozen=True)
class Shape:
    """One published model's tokenizer: its pipeline, its added tokens, its configuration."""

    pipeline: str
    special: tuple[str, ...]
    template: str | Mapping[str, str]
    config: Mapping[str, Any]
    added: tuple[str, ...] = ()
    """Added tokens that are not marked as special."""
    flags: Mapping[str, bool] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write tokenizer.json and tokenizer_config.json with the template inside."""
        raw = _train(self.pipeline)
        raw.add_special_tokens(
            [AddedToken(t, normalized=False, special=True, **self.flags) for t in self.special]
        )
        raw.add_tokens([AddedToken(token, normalized=False) for token in self.added])
        if self.pipeline == "llama3":
            bos = self.special[0]
            around = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos) or 0)]
            )
            raw.post_processor = processors.Sequence([processors.ByteLevel(False), around])
        raw.save(str(folder / "tokenizer.json"))
        named = {} if isinstance(self.template, str) else self.template
        template: Any = [{"name": n, "template": _read(t)} for n, t in named.items()]
        if isinstance(self.template, str):
            template = _read(self.template)
        config = {**self.config, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
        return folder


def _read(template: str) -> str:
    return (TEMPLATES / f"{template}.jinja").read_text("utf-8")


def _train(pipeline: str) -> Tokenizer:
    return Tokenizer.from_str(_trained(pipeline))


@cache
def _trained(pipeline: str) -> str:
    raw = Tokenizer(models.BPE())
    by_bytes = pipeline in ("qwen", "llama3", "gpt2")
    if by_bytes:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        if pipeline != "gpt2":
            first = pre_tokenizers.Split(Regex(_WORDS), "isolated")
        then = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pipeline == "gpt2")
        raw.pre_tokenizer = pre_tokenizers.Sequence([first, then])
        raw.decoder = decoders.ByteLevel()
    if pipeline == "qwen":
        raw.normalizer = normalizers.NFC()
    elif pipeline == "mistral":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif pipeline == "llama2":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        raw.normalizer = normalizers.Sequence(steps)
    elif pipeline == "gemma":
        raw.normalizer = normalizers.Replace(" ", "\u2581")
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if by_bytes else []
    specials = [] if by_bytes else ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        special_tokens=specials,
        show_progress=False,
    )
    # Without the signs of special tokens, whose names would become tokens of the text.
    texts = [re.sub(r"[<>\[\]|]", " ", _read(path.stem)) for path in sorted(TEMPLATES.iterdir())]
    raw.train_from_iterator([*texts, *_CORPUS * 9], trainer)
    return _without_specials(raw, fallback=not by_bytes)


def _without_specials(raw: Tokenizer, *, fallback: bool) -> str:
    """Return the trained tokenizer; tokens that stand for a byte are no added tokens."""
    state = json.loads(raw.to_str())
    state["added_tokens"] = []
    if fallback:
        state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
        steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
        state["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(state)


def _object(content: str) -> dict[str, Any]:
    """Return a token as DeepSeek writes it."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


_BEGIN, _END = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_R1_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": _object(_BEGIN),
    "eos_token": _object(_END),
    "pad_token": _object(_END),
    "unk_token": None,
    "legacy": True,
    "tokenizer_class": "LlamaTokenizerFast",
}
_R1_ADDED = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_LLAMA3_CONFIG = {"bos_token": _LLAMA3[0], "tokenizer_class": "PreTrainedTokenizerFast"}
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_QWEN_CONFIG = {
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "tokenizer_class": "Qwen2Tokenizer",
}
_SENTENCEPIECE = ("<unk>", "<s>", "</s>")
_LLAMA_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": False,
    "tokenizer_class": "LlamaTokenizer",
}
_COMMAND_R = (
    *("<PAD>", "<UNK>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)

SHAPES = {
    "R1-Distill-Qwen": Shape("qwen", (_END, _BEGIN), "r1_distill", _R1_CONFIG, _R1_ADDED),
    "R1-Distill-Llama": Shape(
        "llama3", (_BEGIN, _END, "<|eot_id|>"), "r1_distill", _R1_CONFIG, _R1_ADDED
    ),
    "Llama-3.2": Shape(
        "llama3",
        (*_LLAMA3, "<|eot_id|>", "<|finetune_right_pad_id|>"),
        "llama32",
        {**_LLAMA3_CONFIG, "eos_token": "<|eot_id|>"},
    ),
    "Qwen2.5": Shape("qwen", _CHATML, "qwen25", _QWEN_CONFIG, _THINK[2:]),
    "Qwen3": Shape("qwen", _CHATML, "qwen3", _QWEN_CONFIG, _THINK),
    "SmolLM2": Shape(
        "gpt2",
        _CHATML,
        "smollm2",
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "tokenizer_class": "GPT2Tokenizer",
        },
    ),
    "SmolLM3": Shape(
        "llama3",
        (*_LLAMA3, "<|im_start|>", "<|im_end|>"),
        "smollm3",
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        _THINK,
    ),
    "Mistral-v0.3": Shape(
        "mistral",
        (*_SENTENCEPIECE, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        "mistral_v03",
        _LLAMA_CONFIG,
    ),
    "Llama-2": Shape("llama2", _SENTENCEPIECE, "llama2", {**_LLAMA_CONFIG, "legacy": True}),
    "Hermes-3": Shape(
        "llama3",
        (*_LLAMA3, "<|im_start|>", "<|im_end|>"),
        {"default": "hermes_default", "tool_use": "hermes_tool_use"},
        {**_LLAMA3_CONFIG, "eos_token": "<|im_end|>"},
        _THINK[2:],
    ),
    "Gemma-2": Shape(
        "gemma",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "gemma2",
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
            "tokenizer_class": "GemmaTokenizer",
        },
    ),
    "Command-R": Shape(
        "qwen",
        _COMMAND_R,
        {"rag": "command_r_rag", "default": "command_r_default"},
        {
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "tokenizer_class": "CohereTokenizer",
        },
    ),
    "turns that strip the space beside them": Shape(
        "mistral",
        (*_SENTENCEPIECE, *_CHATML),
        "qwen25",
        {**_LLAMA_CONFIG, "eos_token": "<|im_end|>"},
        flags={"lstrip": True, "rstrip": True},
    ),
}
