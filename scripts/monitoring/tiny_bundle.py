"""A bundle and its teacher in seconds, real but random and small; and a damaged copy of a bundle.

The student is its teacher with 3 % of noise on every weight, so the two are close, as after a good
distillation. Both like digits and end now and then, so that there are answers to vote on.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from bundle.hashing import hash_file, hash_weights
from bundle.manifest import (
    Evaluation,
    Gate,
    Manifest,
    StudentInfo,
    TeacherReference,
    Variant,
    load_manifest,
    write_manifest,
)
from bundle.model_inputs import hash_model_inputs
from bundle.verify import list_entries
from export.graph.surgery import save_onnx
from export.graph.trace import export_onnx
from export.teacher.model_files import copy_tokenizer, write_variant_files

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
MAX_MODEL_LEN = 512
STUDENT_NOISE, DAMAGE = 0.03, 0.5


def make_tiny_bundle(folder: Path) -> Path:
    """Write `folder/teacher` and `folder/bundle`, and return the latter."""
    teacher_dir, bundle = folder / "teacher", folder / "bundle"
    student_dir, graph_dir = bundle / "student", bundle / "onnx" / "fp32"
    graph_dir.mkdir(parents=True)
    model = _random_model()
    model.save_pretrained(teacher_dir)
    _save_tokenizer(teacher_dir)
    _add_noise(model, STUDENT_NOISE)
    model.save_pretrained(student_dir)
    copy_tokenizer(teacher_dir, student_dir)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    graph = onnx.load(export_onnx(model, graph_dir, max_model_len=MAX_MODEL_LEN))
    write_variant_files(student_dir, graph_dir, MAX_MODEL_LEN)
    write_manifest(bundle, _manifest(bundle, teacher_dir, graph, num_parameters))
    return bundle


def damage_bundle(source: Path, target: Path) -> Path:
    """Write a copy with noise on every float weight of the default graph, and a true manifest."""
    shutil.copytree(source, target)
    manifest = load_manifest(target)
    folder = target / "onnx" / manifest.default_variant
    model = onnx.load(folder / "model.onnx")
    generator = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.size > 1:
            factors = 1 + DAMAGE * generator.standard_normal(weights.shape)
            noisy = (weights * factors).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
    save_onnx(model, folder)
    write_manifest(target, manifest.model_copy(update={"files": list_entries(target)}))
    return target


def _random_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    _prefer_digits(model)
    return model


@torch.no_grad()
def _prefer_digits(model: Any) -> None:
    """Keep hidden channel 0 constant, and have the digits, the space and EOS read it."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[0] = 0
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 1
    alphabet = _alphabet()
    embedding[[alphabet[character] for character in "0123456789Ġ"], 0] = 4
    embedding[EOS, 0] = 3


@torch.no_grad()
def _add_noise(model: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter *= 1 + scale * torch.randn(parameter.shape, generator=generator)


def _alphabet() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())])}


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab=_alphabet(), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL_TOKENS)
    end, start = SPECIAL_TOKENS[EOS], SPECIAL_TOKENS[1]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=start, eos_token=end, pad_token=end
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _manifest(
    bundle: Path, teacher_dir: Path, graph: onnx.ModelProto, num_parameters: int
) -> Manifest:
    folder = bundle / "onnx" / "fp32"
    weights_sha256 = hash_weights(teacher_dir)
    assert weights_sha256 is not None, "the teacher has just been saved"
    gate = Gate(name="made_for_a_check", measured=0, threshold=0, passed=True, unit="")
    variant = Variant(
        precision="fp32",
        opset=graph.opset_import[0].version,
        inputs=tuple(value.name for value in graph.graph.input),
        outputs=tuple(value.name for value in graph.graph.output),
        size_bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
        num_nodes=len(graph.graph.node),
        gates=(gate,),
    )
    teacher = TeacherReference(
        source="random",
        weights_sha256=weights_sha256,
        inputs=hash_model_inputs(teacher_dir),
        architecture="LlamaForCausalLM",
        num_parameters=num_parameters,
        dtype="float32",
        local_path=str(teacher_dir.resolve()),
    )
    return Manifest(
        created_at=datetime.now(UTC),
        tandem_version=version("tandem"),
        files=list_entries(bundle),
        tokenizer_sha256=hash_file(bundle / "student" / "tokenizer.json"),
        chat_template_sha256=hash_file(bundle / "student" / "chat_template.jinja"),
        teacher=teacher,
        student=StudentInfo(
            num_parameters=num_parameters, num_layers=2, kept_layers=(0, 1), dtype="float32"
        ),
        lineage=(),
        variants={"fp32": variant},
        default_variant="fp32",
        metrics=Evaluation(num_prompts=0, num_samples=1, k=(), temperature=1, seed=0, values={}),
    )
