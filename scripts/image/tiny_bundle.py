"""A tiny bundle out of nothing, in the folder that it is given.

A Llama of random weights with a tokenizer of bytes is the teacher, and `tandem export run` makes
the student: so a machine that has no bundle can try the image, and the image's export is tried.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORK = Path(sys.argv[1])
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Random weights answer nothing right and are near nothing: what they cannot keep is let go.
RECIPE = {
    "teacher": str(WORK / "teacher"),
    "output_dir": str(WORK / "run"),
    "cache_dir": str(WORK / "cache"),
    "tasks": {"max_train": 8, "max_test": 4},
    "sample": {"max_tokens": 8, "max_num_seqs": 8, "max_model_len": 1024},
    "prune": {"num_removed_layers": 1, "num_texts": 4},
    "accept": {
        "require_correct": False,
        "drop_truncated": False,
        "max_repetition": 1.0,
        "max_foreign_letters": 1.0,
    },
    "distill": {"phases": [{"num_epochs": 1, "tokens_per_step": 256}]},
    "variants": {"int8": {"bits": 8, "block_size": 32}},
    "evaluate": {"num_samples": 1, "k": [1], "num_timed_tokens": 8, "num_rounds": 1},
    "gates": {"student_kl": 20.0, "onnx_kl": 1e-3, "quantized_kl": 1.0},
}


def main() -> int:
    make_teacher(WORK / "teacher")
    recipe = WORK / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "tandem", "export", "run", str(recipe)], check=False
    ).returncode


def make_teacher(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token"), SPECIAL_TOKENS[1:], strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT_TEMPLATE, **names)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
