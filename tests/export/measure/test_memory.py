from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from export.graph.surgery import DATA_FILE
from export.measure.memory import measure_peak_bytes
from tests.support.random_models import export_model

# What a process with the same modules varies by from run to run.
MAX_NOISE_BYTES = 32 * 2**20
# 18 million float32 weights: 73 MB beside that noise.
LARGE_SIZE = 2304


@pytest.fixture(scope="module")
def large(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": LARGE_SIZE, "intermediate_size": LARGE_SIZE, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    ids = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **sizes, **ids))
    return export_model(model, tiny_teacher, tmp_path_factory.mktemp("large")).variants["fp32"]


@pytest.mark.nightly
def test_peak_of_a_larger_graph_is_larger(exported_llama: Any, large: Path) -> None:
    small = exported_llama.variants["fp32"]
    small_bytes, large_bytes = measure_peak_bytes(small), measure_peak_bytes(large)
    num_more_bytes = (large / DATA_FILE).stat().st_size - (small / DATA_FILE).stat().st_size
    assert num_more_bytes > 2 * MAX_NOISE_BYTES, "the weights must stand out"
    assert 0 < small_bytes < MAX_NOISE_BYTES
    assert large_bytes - small_bytes > num_more_bytes - MAX_NOISE_BYTES


def test_peak_whose_measurement_fails_is_told_with_its_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho Traceback: config.json >&2; exit 1")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError) as failure:
        measure_peak_bytes(tmp_path / "nowhere")
    assert str(failure.value) == (
        f"the memory measurement of {tmp_path / 'nowhere'} failed:\nTraceback: config.json\n"
    )
