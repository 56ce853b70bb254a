"""From a GGUF file to a plain safetensors folder; every line that knows transformers' version.

A GGUF's tokenizer is built here from the file's own vocabulary, merges and pre-tokenizer name.
What transformers 4.57 makes of it is wrong in four ways that a student would inherit: BOS is
prepended, EOS is the BOS token, its class makes other runtimes tokenize differently, and digits
are not split off first, so that "\\n\\n1." becomes other tokens than those the teacher learned.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.run.model_specs import TeacherError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str], None]


def convert_gguf(path: Path, target: Path, progress: Progress) -> None:
    """Write the GGUF model as config, float32 safetensors and a plain fast tokenizer.

    float32, because the values that 4-bit blocks stand for (scale x integer + offset) do not fit
    bfloat16's 8 bits: rounding them would make another teacher than the file's.
    """
    metadata = read_metadata(path)
    tokenizer = build_tokenizer(metadata)
    progress(f"converting {path.name} to safetensors")
    _convert_weights(path, target, metadata)
    _save_tokenizer(tokenizer, target, metadata)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors are written 0600; the server may be another user


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the GGUF's key-value pairs."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise TeacherError(f"{path} cannot be read as GGUF: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items()}


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return bos, eos, unk and pad ids as the model knows them; pad falls back to EOS.

    >>> special_token_ids({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1})
    {'bos': 1, 'eos': 2, 'pad': 2}
    """
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {
        name: int(metadata[f"tokenizer.ggml.{key}_token_id"])
        for name, key in keys.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if "eos" not in found:
        raise TeacherError("the GGUF names no EOS token: a student could not learn where to stop")
    return {**found, "pad": found.get("pad", found["eos"])}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer that a GGUF describes; it adds no special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2" or metadata.get("tokenizer.ggml.add_bos_token", False):
        raise TeacherError(
            f"the GGUF's tokenizer ({kind!r}, BOS added: "
            f"{metadata.get('tokenizer.ggml.add_bos_token', False)}) is not a byte-level BPE "
            "without BOS: give the original safetensors folder or Hugging Face id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf.TokenType
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == control
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == user_defined
        ]
    )
    return tokenizer


def _pre_tokenizer(name: str) -> Any:
    """The splitting rule behind a `tokenizer.ggml.pre` name, as llama.cpp defines it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits_first = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    known = {"gpt-2": byte_level, "smollm": digits_first}
    if name not in known:
        raise TeacherError(
            f"the GGUF's pre-tokenizer {name!r} is none of {', '.join(sorted(known))}: "
            "give the original safetensors folder or Hugging Face id instead"
        )
    return known[name]


def _convert_weights(path: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # In a folder of its own: transformers would also read what lies beside the file.
    with tempfile.TemporaryDirectory() as alone, _quiet_unless_terminal():
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=path.name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except ValueError as error:  # an architecture that transformers does not convert
            raise TeacherError(f"{path} cannot be converted: {error}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise TeacherError(f"{path} lacks weights of its architecture: {loading}")
    ids = {f"{name}_token_id": token_id for name, token_id in special_token_ids(metadata).items()}
    model.config.update(ids)
    ids.pop("unk_token_id", None)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)


def _save_tokenizer(tokenizer: Tokenizer, target: Path, metadata: Mapping[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    architecture = metadata["general.architecture"]
    special = {
        f"{name}_token": tokens[token_id] for name, token_id in special_token_ids(metadata).items()
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        # The class's own default adds token_type_ids, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=int(metadata[f"{architecture}.context_length"]),
        **special,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    fast.save_pretrained(target)
    (target / "special_tokens_map.json").unlink()  # tokenizer_config.json says the same


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' GGUF progress bar out of log files; `disable=None` means "no terminal"."""
    from transformers import modeling_gguf_pytorch_utils as module

    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=None)
    try:
        yield
    finally:
        module.tqdm = bar
