"""A pair whose heads have other sizes than its tokenizer, from `plan` to an answer on the wire.

As Qwen2.5's 7B (152,064 rows, untied) and 1.5B (151,936, tied) share a tokenizer of 151,665 tokens,
and R1's distillates after them. Here it is 640 and 576 rows for 516 ids, three of which no token
has; the rows without tokens are loud, so that one of them is what either model likes best.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tandem.cli
from export.pipeline import open_pipeline
from export.run.recipe import load_config
from export.teacher.accept import read_examples
from protos.tandem.v1 import inference_pb2 as pb
from serve.client import Client
from serve.text.tokenizer import Tokenizer
from tandem.demo import serving
from tests.support.models.tiny_graphs import TINY_SHAPE
from tests.support.models.tiny_teacher import save_tiny_teacher
from tests.support.recipes import ACCEPT_ALL, RecordingReporter, write_recipe

TEACHER_ROWS, STUDENT_ROWS, NUM_TOKENS, MISSING = 640, 576, 516, (512, 513, 514)
# Over the tokens both models are nearly random; the loud rows would be worth a hundred nats.
MAX_NATS = 20
PHASE = {"temperature": 1.0, "learning_rate": 1e-3, "tokens_per_step": 64}
SETTINGS: dict[str, Any] = {
    "tasks": {"max_train": 12, "max_test": 3},
    "sample": {"max_tokens": 12, "max_num_seqs": 8, "max_model_len": 256},
    "accept": ACCEPT_ALL,
    "cache": {"kind": "top_k", "top_k": 8},
    "distill": {
        "phases": [
            {**PHASE, "temperature": 2.0},
            {**PHASE, "alpha": 1.0, "teacher_logits": "cache"},
            {**PHASE, "alpha": 1.0, "data": "student", "divergence": "jsd"},
        ]
    },
    # Those of export/recipes/r1-distill-qwen-1.5b.yaml.
    "variants": {
        "bf16": {"method": "bfloat16"},
        "fp16": {"method": "float16"},
        "int8": {"bits": 8, "block_size": 128},
        "int4": {"bits": 4, "block_size": 32, "method": "gptq"},
    },
    "evaluate": {
        "max_task_prompts": 2,
        "num_samples": 2,
        "k": [1, 2],
        "task_max_tokens": 8,
        "num_timed_tokens": 4,
        "num_rounds": 1,
    },
    "gates": {"student_kl": 100.0, "onnx_kl": 1e-6, "quantized_kl": 1.0},
}


def save_model(folder: Path, num_rows: int, *, is_tied: bool, seed: int) -> Path:
    """Write a Qwen2 of two layers with the tiny teacher's tokenizer, whose last id lies apart."""
    save_tiny_teacher(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<far>"] = NUM_TOKENS - 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=num_rows,
        max_position_embeddings=2048,
        **TINY_SHAPE,
        tie_word_embeddings=is_tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        model.lm_head.weight[[*MISSING, *range(NUM_TOKENS, num_rows)]] *= 10
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded_pair")
    paths = {
        "teacher": save_model(folder / "teacher", TEACHER_ROWS, is_tied=False, seed=0),
        "student": save_model(folder / "student", STUDENT_ROWS, is_tied=True, seed=1),
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
    }
    return write_recipe(folder / "recipe.yaml", SETTINGS, **paths)


@pytest.fixture(scope="module")
def pipeline(recipe: Path) -> Any:
    with pytest.raises(SystemExit) as ended:
        tandem.cli.main(["export", "plan", str(recipe)])
    assert ended.value.code == 0
    pipeline = open_pipeline(load_config(recipe), RecordingReporter())
    pipeline.package()
    return pipeline


def test_tokenizer_and_heads_have_three_sizes(recipe: Path) -> None:
    real_tokens = Tokenizer.load(recipe.parent / "teacher").real_tokens
    assert (real_tokens.num_tokens, real_tokens.missing_ids) == (NUM_TOKENS, MISSING)


def test_text_and_measurements_of_the_export_are_of_real_tokens(pipeline: Any) -> None:
    accepted = pipeline.artifacts.accepted
    examples = [*read_examples(accepted, "train"), *read_examples(accepted, "test")]
    sampled = {token_id for example in examples for token_id in example.completion_token_ids}
    assert max(sampled) < NUM_TOKENS and not sampled & set(MISSING)
    summary = json.loads((pipeline.path(pipeline.evaluated) / "summary.json").read_text())
    losses = [
        json.loads(line)["soft"]
        for line in (pipeline.path(pipeline.distilled) / "training.jsonl").read_text().splitlines()
    ]
    assert max(losses) < MAX_NATS
    kl = {name: of["forward_kl"] for name, of in summary["quality"]["teacher"].items()}
    assert all(0 < kl[name] < MAX_NATS for name in ("student", "fp32", "fp16", "int8", "int4"))


def test_answers_on_the_wire_and_their_exact_divergence_are_of_real_tokens(pipeline: Any) -> None:
    bundle = pipeline.config.output_dir / "bundle"
    teacher = ["--teacher", str(pipeline.inputs.teacher.path), "--teacher-dtype", "float32"]
    request = pb.CompareRequest(
        prompt="What is 3 plus 4?",
        sampling=pb.SamplingParams(num_samples=8, temperature=1.0, max_tokens=24, seed=7),
        divergence=pb.DivergenceOptions(exact=True),
        output=pb.OutputOptions(top_logprobs=3),
    )
    with serving(bundle, teacher) as ready, Client(ready["address"], timeout_s=60) as client:
        models = client.get_models().models
        response = client.compare(request)
    assert [model.vocab_size for model in models] == [NUM_TOKENS] * 2
    assert len(response.samples) == 16
    for sample in response.samples:
        drawn = set(sample.token_ids)
        assert drawn and max(drawn) < NUM_TOKENS and not drawn & set(MISSING)
        assert not sample.divergence_error and 0 < sample.divergence.exact_mean < MAX_NATS
        for logprobs in (sample.logprobs, sample.divergence.reference_logprobs):
            assert len(logprobs) == len(sample.token_ids) and np.mean(logprobs) > -MAX_NATS
