"""Models as they were saved, in whichever spelling; and that nothing else opens a folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bundle.model_config import judge_config, read_model_config
from bundle.model_folder import ModelFolder
from bundle.token_ids import TokenIds
from estimators.divergence import exact_kl
from serve.models.pretrained import load_pretrained, make_config
from serve.models.torch_backend import TorchBackend
from tests.support.models.model_folders import shard
from tests.support.models.published_configs import PUBLISHED

ROOT = Path(__file__).parents[3]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, rope_theta=5e5),
    "llama3": lambda: LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling=LLAMA3),
    "mistral": lambda: MistralConfig(**SIZES, rope_theta=1e6, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_theta=1e6, rope_scaling=YARN),
    "qwen3": lambda: Qwen3Config(**SIZES, rope_theta=1e6, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**SIZES, rope_theta=5e6),
}


def save_as_version_5(source: Path, target: Path, *, by_layer: bool = False) -> None:
    """Copy a model whose configuration version 4 wrote, spelled as version 5 does."""
    shutil.copytree(source, target)
    raw = json.loads((source / "config.json").read_text())
    rope = {"rope_type": "default", **(raw.pop("rope_scaling", None) or {})}
    rope["rope_theta"] = raw.pop("rope_theta")
    raw["rope_parameters"] = {"full_attention": rope} if by_layer else rope
    raw["transformers_version"] = "5.7.0"
    (target / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_model_saved_in_the_new_spelling_has_kl_0_to_itself(
    tmp_path: Path, name: str, by_layer: bool
) -> None:
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    reference.save_pretrained(tmp_path / "old")
    save_as_version_5(tmp_path / "old", tmp_path / "new", by_layer=by_layer)
    ids = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits[0]
        found = load_pretrained(tmp_path / "new", torch.float32)(ids).logits[0]
    assert found.equal(expected)
    assert exact_kl(expected.numpy(), found.numpy()).max() == 0


def test_served_model_is_the_same_in_both_spellings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama3"]()).save_pretrained(tmp_path / "old")
    save_as_version_5(tmp_path / "old", tmp_path / "new")
    old, new = (
        TorchBackend.load(
            tmp_path / name, device="cpu", dtype=torch.float32, max_num_seqs=1, max_model_len=100
        ).forward(0, [list(range(60))], [0])
        for name in ("old", "new")
    )
    assert new.equal(old)


def test_shards_are_loaded_whatever_lies_beside_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    shard(tmp_path)
    loaded = load_pretrained(tmp_path, torch.float32)
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].equal(weight), name


# Set here, or read by no model of ours.
APART = {"_name_or_path", "architectures", "transformers_version", "dtype", "pad_token_id"}
APART |= {"is_llama_config", "rope_interleaved", "transformers.js_config", "torch_dtype"}
APART |= {"_attn_implementation_autoset"}


@pytest.mark.parametrize(
    "raw", [raw for raw in PUBLISHED if "rope_parameters" not in raw], ids=lambda r: r["model_type"]
)
def test_published_configuration_is_what_transformers_makes_of_it(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    eos = raw["eos_token_id"]
    ids = TokenIds(tuple(eos) if isinstance(eos, list) else (eos,), raw["bos_token_id"], None)
    judged = judge_config(raw)
    config = make_config(ModelFolder(tmp_path, judged, ids, (), {})).to_dict()
    copied = json.loads(json.dumps(raw))
    expected = CONFIG_MAPPING[raw["model_type"]].from_dict(copied).to_dict()
    for key in sorted(config.keys() | expected.keys() - APART - {*judged.ignored_keys}):
        if key not in APART:
            assert config.get(key) == expected.get(key), key


def test_saved_student_is_spelled_as_both_versions_read(tmp_path: Path) -> None:
    """Version 5 turns `rope_theta` and `rope_scaling` into its own spelling; 4 knows no other."""
    AutoModelForCausalLM.from_config(CONFIGS["llama3"]()).save_pretrained(tmp_path / "old")
    save_as_version_5(tmp_path / "old", tmp_path / "new")
    load_pretrained(tmp_path / "new", torch.float32).save_pretrained(tmp_path / "student")
    raw = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (raw["rope_theta"], raw["rope_scaling"]) == (5e5, LLAMA3)
    assert "rope_parameters" not in raw
    configs = [read_model_config(tmp_path / name) for name in ("new", "student")]
    assert configs[0].rope == configs[1].rope


# Files that may hand a path to a library: GGUF alone in a folder; judged folders in the benchmark.
ALLOWED = {
    "serve/models/pretrained.py",
    "export/teacher/gguf.py",
    "bench/peers/engines/peer_ortmodel.py",
}


def test_nothing_else_gives_a_folder_to_transformers() -> None:
    folders = ("bench", "bundle", "export", "serve", "loadtest", "scripts", "examples")
    paths = [
        *ROOT.glob("*.py"),
        *(path for name in folders for path in (ROOT / name).rglob("*.py")),
    ]
    pattern = re.compile(r"from_pretrained\(|AutoConfig|AutoTokenizer|AutoModel")
    found = {path for path in paths if pattern.search(path.read_text(encoding="utf-8"))}
    assert {path.relative_to(ROOT).as_posix() for path in found} == ALLOWED
