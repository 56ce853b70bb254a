"""What published configurations say, and what is refused before a model library sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bundle.errors import ModelFolderError
from bundle.model_config import ModelConfig, check_stays, judge_config
from tests.support.models.model_folders import TINY
from tests.support.models.published_configs import (
    LLAMA_1_7B,
    LLAMA_2_7B,
    LLAMA_3_2_1B,
    MISTRAL_7B,
    MISTRAL_NEMO,
    QWEN2_5_05B,
    QWEN2_5_15B_NEW,
    QWEN3_06B,
    QWEN3_YARN,
    R1_DISTILL_QWEN_7B,
    SMOLLM2_135M,
    SMOLLM3_3B,
)


def facts(config: ModelConfig) -> tuple[Any, ...]:
    return (
        config.vocab_size, config.num_key_value_heads, config.head_dim,
        config.tie_word_embeddings, config.rope.theta,
        config.rope.scaling and config.rope.scaling["rope_type"], config.dtype,
        config.settings.get("sliding_window", "absent"), config.ignored_keys,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (LLAMA_1_7B, (32000, 32, 128, False, 10000.0, None, "float16", "absent", ())),
        (LLAMA_2_7B, (32000, 32, 128, False, 10000.0, None, "float16", "absent", ())),
        (LLAMA_3_2_1B, (128256, 8, 64, True, 500000.0, "llama3", "bfloat16", "absent", ())),
        (SMOLLM2_135M, (49152, 3, 64, True, 100000, None, "bfloat16", "absent", ())),
        (MISTRAL_7B, (32000, 8, 128, False, 10000.0, None, "bfloat16", 4096, ())),
        (MISTRAL_NEMO, (131072, 8, 128, False, 1000000.0, None, "bfloat16", None, ())),
        (QWEN2_5_05B, (151936, 2, 64, True, 1000000.0, None, "bfloat16", 32768, ())),
        (
            R1_DISTILL_QWEN_7B,
            (152064, 4, 128, False, 10000, None, "bfloat16", 4096, ("use_mrope",)),
        ),
        (QWEN2_5_15B_NEW, (151936, 2, 128, True, 1000000.0, None, "bfloat16", None, ())),
        (QWEN3_06B, (151936, 8, 128, True, 1000000, None, "bfloat16", None, ())),
        (QWEN3_YARN, (151936, 8, 128, True, 10000, "yarn", "bfloat16", None, ())),
        (
            SMOLLM3_3B,
            (128256, 4, 128, True, 5000000.0, None, "bfloat16", None, ("pretraining_tp",)),
        ),
    ],
)  # fmt: skip
def test_published_configuration_is_read(raw: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert facts(judge_config(raw)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is missing; supported are llama"),
        ({"model_type": "gpt_neox"}, "model type 'gpt_neox' is not supported; supported are llama"),
        ({"model_type": ["llama"]}, r"model type \['llama'\] is not supported"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
            r"'mistral3' \(a model of several parts\) is not supported",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "the language model of 'llama'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "weights are quantized"),
        ({"hidden_size": -8}, "hidden_size is -8, allowed is an integer from 1 to 16777216"),
        ({"hidden_size": "8"}, "hidden_size is '8', allowed is an integer"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, allowed is"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, allowed is"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, allowed is"),
        ({"num_attention_heads": 3}, "hidden_size 8 is no multiple of num_attention_heads 3"),
        ({"head_dim": 4, "num_key_value_heads": 3}, "is no multiple of num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim is 3, rotary embeddings want an even one"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', allowed is 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, allowed is 1.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, allowed is null"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', allowed is true or false"),
        ({"torch_dtype": "os"}, "torch_dtype is 'os', allowed are float32"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', allowed are float32"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype is 'float16', torch_dtype is"),
        ({"hidden_size": 0, "vocab_size": "x"}, "vocab_size is 'x'.*; hidden_size is 0"),
    ],
)
def test_configuration_that_is_wrong_or_not_supported_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge_config({**TINY, **changes})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (QWEN3_06B | {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        (QWEN3_06B | {"layer_types": ["full_attention"]}, "lists 1 layers, num_hidden_layers is"),
        (QWEN3_06B | {"layer_types": ["linear_attention"] * 28}, "allowed is a list of full_att"),
        (SMOLLM3_3B | {"no_rope_layers": [1, 0]}, "no_rope_layers lists 2 layers"),
        (SMOLLM3_3B | {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, allowed is"),
        (
            MISTRAL_7B | {"layer_types": ["sliding_attention", "full_attention"] * 16},
            "layer_types differ from sliding_window",
        ),
    ],
)
def test_layers_that_are_not_the_models_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_config(raw)


def test_only_listed_keys_are_handed_on() -> None:
    config = judge_config({**TINY, "name_or_path": "a/b", "sliding_window": 4, "_private": {}})
    assert config.ignored_keys == ("_private", "name_or_path", "sliding_window")
    assert not config.settings.keys() & {*config.ignored_keys, "architectures", "eos_token_id"}


@pytest.mark.parametrize(
    "raw",
    [
        {"auto_map": {"AutoModel": "modeling.X"}},
        {"auto_map": {}},
        {"text_config": {"sub": [{"AUTO_MAP": {"AutoConfig": "a/b--x.X"}}]}},
        {"_attn_implementation": "kernels-community/evil"},
        {"_attn_implementation_internal": "evil/attention:forward"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil/attention"}},
        {"attn_implementation": ["evil/attention"]},
        {"vision_config": {"_attn_implementation": "paged|evil/attention"}},
        {"_experts_implementation": "evil/experts"},
        {"norm_implementation": "evil/norm"},
        {"custom_generate": "evil/generate"},
        {"trust_remote_code": True},
        {"transformers_weights": "../w.safetensors"},
        {"base_model_name_or_path": "/other"},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "evil/norm:RMSNorm"}},
    ],
)
def test_key_that_leads_out_of_the_folder_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ModelFolderError, match=r"config.json has '\w+'(: .*)?, which \w+"):
        check_stays(raw, Path("config.json"))


def test_implementations_of_the_library_itself_are_passed_over() -> None:
    """Many published files name one; which is used is chosen here."""
    names = ("sdpa", "eager", "flash_attention_2", None)
    for name in names:
        check_stays({"_attn_implementation": name, "auto_map": None}, Path("config.json"))
    assert "attn_implementation" not in judge_config(TINY).settings
