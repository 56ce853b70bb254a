from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.graph.surgery import DATA_FILE
from export.measure.memory import measure_peak_bytes

# What a process with the same modules varies by from run to run.
MAX_NOISE_BYTES = 32 * 2**20
# 18 million float32 weights: 73 MB beside that noise.
LARGE_SIZE = 2304


@pytest.fixture(scope="module")
def large(export_to: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=LARGE_SIZE,
        intermediate_size=LARGE_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder: Path = export_to(tmp_path_factory.mktemp("large"), LlamaForCausalLM(config)).variants[
        "fp32"
    ]
    return folder


def test_larger_graph_has_the_larger_peak(exported_llama: Any, large: Path) -> None:
    small = exported_llama.variants["fp32"]
    small_bytes, large_bytes = measure_peak_bytes(small), measure_peak_bytes(large)
    num_more_bytes = (large / DATA_FILE).stat().st_size - (small / DATA_FILE).stat().st_size
    assert num_more_bytes > 2 * MAX_NOISE_BYTES, "the weights must stand out"
    assert 0 < small_bytes < MAX_NOISE_BYTES
    assert large_bytes - small_bytes > num_more_bytes - MAX_NOISE_BYTES


def test_failure_of_the_measurement_is_told_with_its_stderr(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as failure:
        measure_peak_bytes(tmp_path / "nowhere")
    text = str(failure.value)
    assert text.startswith(f"the memory measurement of {tmp_path / 'nowhere'} failed:\n")
    assert "Traceback" in text and "config.json" in text
