"""A bundle and its teacher in seconds, real but random and small; and a damaged copy of a bundle.

The student is its teacher with 3 % of noise on every weight, so the two are close, as after a good
distillation. Both like digits and end now and then, so that there are answers to vote on.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from bundle.manifest import load_manifest, write_manifest
from bundle.verify import list_entries
from export.graph.surgery import save_onnx
from export.graph.trace import export_onnx
from export.teacher.model_files import copy_tokenizer, write_variant_files
from tests.support.backends import ALPHABET, EOS, save_byte_tokenizer
from tests.support.models.manifests import manifest_of
from tests.support.processes import TandemProcess

MAX_MODEL_LEN = 512
STUDENT_NOISE, DAMAGE = 0.03, 0.5


def make_tiny_bundle(folder: Path) -> Path:
    """Write `folder/teacher` and `folder/bundle`, and return the latter."""
    teacher_dir, bundle = folder / "teacher", folder / "bundle"
    student_dir, graph_dir = bundle / "student", bundle / "onnx" / "fp32"
    graph_dir.mkdir(parents=True)
    model = _random_model()
    model.save_pretrained(teacher_dir)
    save_byte_tokenizer(teacher_dir)
    _add_noise(model, STUDENT_NOISE)
    model.save_pretrained(student_dir)
    copy_tokenizer(teacher_dir, student_dir)
    export_onnx(model, graph_dir, max_model_len=MAX_MODEL_LEN)
    write_variant_files(student_dir, graph_dir, MAX_MODEL_LEN)
    manifest = manifest_of(bundle, teacher_dir, variant="fp32", is_teacher_local=True)
    write_manifest(bundle, manifest)
    return bundle


@functools.cache
def shared_tiny_bundle() -> Path:
    """Return a bundle of this process, removed at its end; whoever uses it leaves it as it is."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-bundle-"))
    atexit.register(shutil.rmtree, folder)
    return make_tiny_bundle(folder)


def tiny_student(name: str, folder: Path, *flags: str) -> TandemProcess:
    """Return `tandem serve` of the shared bundle's student, not started yet."""
    given = ("--bundle", str(shared_tiny_bundle()), "--no-teacher", "--device", "cpu")
    settings = ("--threads", "1", "--max-model-len", str(MAX_MODEL_LEN))
    return TandemProcess(name, folder, [*given, *settings, *flags])


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
        vocab_size=len(ALPHABET),
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
    embedding[[ALPHABET[character] for character in "0123456789Ġ"], 0] = 4
    embedding[EOS, 0] = 3


@torch.no_grad()
def _add_noise(model: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter *= 1 + scale * torch.randn(parameter.shape, generator=generator)
