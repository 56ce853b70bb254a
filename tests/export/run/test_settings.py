from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from export.run.errors import ConfigError
from export.run.recipe import load_config
from export.run.settings import BuiltinSource, ExportConfig, JsonlSource, ReasoningGymSource
from export.run.variants import (
    DynamicVariant,
    GridConfig,
    HalfVariant,
    StaticVariant,
    WeightOnlyVariant,
)

RECIPES = sorted(Path("export/recipes").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"teacher": "some/model", "output_dir": "runs/x"}
INT4 = {"bits": 4, "block_size": 32}


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return path


def phases(**settings: Any) -> dict[str, Any]:
    """Two phases, the second with `settings`: a message must name the right one."""
    return {"distill": {"phases": [{}, settings]}}


def cached(kind: str, **settings: Any) -> dict[str, Any]:
    return {"cache": {"kind": kind}} | phases(teacher_logits="cache", **settings)


def variant(**settings: Any) -> dict[str, Any]:
    return {"variants": {"v": settings}}


def source(**settings: Any) -> dict[str, Any]:
    return {"tasks": {"sources": [settings]}}


# --- what a recipe means


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a section's class and those of all sections in it."""
    yield model
    for field in model.model_fields.values():
        for part in find_classes(field.annotation):
            yield from sections(part)


def find_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from find_classes(part)


@pytest.mark.parametrize("section", dict.fromkeys(sections(ExportConfig)))
def test_key_of_a_recipe_is_described_in_a_sentence(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert (field.description or name)[-1:] == ".", name


def test_recipe_without_settings_has_those_of_the_design(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "recipe.yaml"))
    (phase,) = config.distill.phases
    assert (phase.data, phase.teacher_logits, phase.divergence) == ("teacher", "live", "forward_kl")
    assert (phase.alpha, phase.temperature) == (0.5, 2.0)
    assert (phase.hidden_weight, phase.attention_weight) == (0.0, 0.0)
    assert config.gates.model_dump() == {
        "onnx_kl": 1e-6,
        "onnx_logit_difference": 1e-3,
        "quantized_kl": 0.02,
        "trained_kl": 0.05,
        "student_kl": 0.40,
    }
    assert config.tasks.sources == (BuiltinSource(),)
    assert (config.cache.kind, config.student, config.select.rule) == ("none", None, "fastest")


def test_recipe_without_variants_has_weights_of_8_and_4_bits_with_int8_activations() -> None:
    variants = ExportConfig.model_validate(MINIMAL).variants
    assert variants == {
        "int8": WeightOnlyVariant(bits=8, block_size=128, accuracy_level=4),
        "int4": WeightOnlyVariant(bits=4, block_size=32, accuracy_level=4),
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_that_is_shipped_loads(recipe: Path) -> None:
    assert load_config(recipe).teacher


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (variant(**INT4), WeightOnlyVariant),
        (variant(**INT4, method="hqq"), WeightOnlyVariant),
        (variant(**INT4, method="gptq"), WeightOnlyVariant),
        (variant(method="dynamic"), DynamicVariant),
        (variant(method="static"), StaticVariant),
        (variant(method="float16"), HalfVariant),
        (variant(method="bfloat16"), HalfVariant),
        (source(kind="builtin", families=["add"]), BuiltinSource),
        (source(kind="jsonl", path="prompts.jsonl"), JsonlSource),
        (source(kind="reasoning_gym", dataset="basic_arithmetic"), ReasoningGymSource),
    ],
)
def test_method_of_a_variant_and_kind_of_a_source_decide_what_it_is(
    settings: dict[str, Any], expected: type
) -> None:
    config = ExportConfig.model_validate(MINIMAL | settings)
    found = config.variants["v"] if "variants" in settings else config.tasks.sources[0]
    assert type(found) is expected
    assert ExportConfig.model_validate(config.model_dump()) == config


def test_variant_override_replaces_the_grid_of_its_linear_layers_alone() -> None:
    eight = GridConfig(bits=8, block_size=16)
    recipe = WeightOnlyVariant(bits=4, block_size=32, overrides={"lm_head": eight})
    assert recipe.grid_of("lm_head") is eight
    assert (recipe.grid_of("qkv_proj").bits, recipe.grid_of("qkv_proj").block_size) == (4, 32)


@pytest.mark.parametrize(
    "sections",
    [
        cached("dense", temperature=4.0, divergence="reverse_kl"),
        cached("top_k", temperature=1.0, divergence="jsd"),
        cached("random_sampling", temperature=1.0, divergence="forward_kl"),
        {"accept": {"min_pass_rate": 0.5, "max_pass_rate": 0.5}},
        {"evaluate": {"num_samples": 4, "k": [1, 4]}},
        {"tasks": {"max_train": 8}, "prune": {"num_texts": 8}},
        variant(**INT4, method="gptq", train={"alpha": 1.0}),
        {"distill": {"freeze_shared_layers": True}},
        {"student": "other/model"} | phases(hidden_weight=1.0),
    ],
)
def test_recipe_that_is_just_allowed_loads(tmp_path: Path, sections: dict[str, Any]) -> None:
    load_config(write(tmp_path / "recipe.yaml", **sections))


# --- what is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        # Wrong keys and values.
        ({"teachr": "x"}, r"teachr: Extra inputs are not permitted, got 'x'"),
        ({"distill": {"alpha": 0.5}}, r"distill\.alpha: Extra inputs are not permitted, got 0\.5"),
        (phases(alhpa=0.5), r"distill\.phases\.1\.alhpa: Extra inputs .*, got 0\.5"),
        (phases(alpha=1.5), r"distill\.phases\.1\.alpha: .*less than or equal to 1, got 1\.5"),
        (phases(temperature=0), r"distill\.phases\.1\.temperature: .*greater than 0, got 0"),
        (phases(jsd_beta=1), r"distill\.phases\.1\.jsd_beta: .*less than 1, got 1"),
        (phases(warmup_share=1), r"distill\.phases\.1\.warmup_share: .*less than 1, got 1"),
        (
            phases(learning_rate=float("nan")),
            r"distill\.phases\.1\.learning_rate: .*finite number, got nan",
        ),
        (
            phases(divergence="kl"),
            r"distill\.phases\.1\.divergence: .*'forward_kl', 'reverse_kl' or 'jsd', got 'kl'",
        ),
        ({"distill": {"phases": []}}, r"distill\.phases: .*at least 1 item.*, got \[\]"),
        ({"distill": {"checkpoint_every_s": 0}}, r"distill\.checkpoint_every_s: .*, got 0"),
        ({"sample": {"dtype": "int3"}}, r"sample\.dtype: .*'bfloat16' or 'float32', got 'int3'"),
        ({"tasks": {"max_test": 0}}, r"tasks\.max_test: .*greater than 0, got 0"),
        ({"tasks": {"sources": []}}, r"tasks\.sources: .*at least 1 item.*, got \[\]"),
        (source(kind="csv"), r"tasks\.sources\.0: .*'csv'.*'builtin', 'jsonl', 'reasoning_gym'"),
        ({"cache": {"kind": "all"}}, r"cache\.kind: .*'none', 'dense', 'top_k' or .*, got 'all'"),
        ({"prune": {"kept_mlp_share": 0}}, r"prune\.kept_mlp_share: .*greater than 0, got 0"),
        ({"onnx": {"max_model_len": 1}}, r"onnx\.max_model_len: .*greater than 1, got 1"),
        ({"gates": {"quantized_kl": -1}}, r"gates\.quantized_kl: .*or equal to 0, got -1"),
        ({"select": {"rule": "best"}}, r"select\.rule: .*'fastest', 'lowest_kl' or 'knee'"),
        ({"select": {"max_kl_excess": -0.1}}, r"select\.max_kl_excess: .*or equal to 0, got -0\.1"),
        (variant(bits=3, block_size=32), r"variants\.v.bits: .*4 or 8, got 3"),
        (variant(bits=8), r"variants\.v.block_size: Field required"),
        (variant(bits=8, block_size=48), r"variants\.v.block_size: .*256, got 48"),
        (variant(**INT4, accuracy_level=5), r"variants\.v.accuracy_level: .*4, got 5"),
        (variant(method="awq"), r"variants\.v: Input tag 'awq' .*'rtn', 'dynamic', 'static'"),
        (variant(method="dynamic", bits=8), r"variants\.v\.bits: Extra inputs .*got 8"),
        (
            variant(method="static", calibration="max"),
            r"variants\.v\.calibration: .*'minmax', 'entropy' or 'percentile', got 'max'",
        ),
        (
            variant(**INT4, overrides={"q_proj": INT4}),
            r"variants\.v.overrides\.q_proj.*'qkv_proj', .*got 'q_proj'",
        ),
        ({"variants": {"Int 8": INT4}}, r"variants\.Int 8"),
        ({"output_dir": None}, r"output_dir: .*, got None"),
        ({"variants": {"int8": 8}}, r"variants\.int8"),
        ({"variants": {"int8": {"method": ["rtn"]}}}, r"variants\.int8"),
        # Settings that contradict each other.
        (
            {"accept": {"min_pass_rate": 0.7, "max_pass_rate": 0.6}},
            r"accept: Value error, min_pass_rate 0\.7 exceeds max_pass_rate 0\.6",
        ),
        (
            phases(data="student", teacher_logits="cache"),
            r"distill\.phases\.1: .*'cache' has no logits of what the student samples",
        ),
        (
            cached("dense", hidden_weight=0.1),
            r"distill\.phases\.1: .*'cache' has neither hidden states nor attention maps",
        ),
        (
            cached("dense", attention_weight=0.1),
            r"distill\.phases\.1: .*'cache' has neither hidden states nor attention maps",
        ),
        (
            {"evaluate": {"num_samples": 4, "k": [1, 8]}},
            r"evaluate: Value error, k 8 is outside 1 to num_samples 4",
        ),
        ({"evaluate": {"k": [0]}}, r"evaluate: Value error, k 0 is outside 1 to num_samples 8"),
        (
            variant(**INT4, method="hqq", train={}),
            r"variants\.v: .*only symmetric rtn and gptq grids can be trained on",
        ),
        (
            variant(**INT4, symmetric=False, train={}),
            r"variants\.v: .*only symmetric rtn and gptq grids can be trained on",
        ),
        (
            variant(**INT4, train={"data": "student"}),
            r"variants\.v: .*train\.data: the text is the teacher's; give 'teacher'",
        ),
        (
            variant(**INT4, train={"teacher_logits": "cache"}),
            r"variants\.v: .*train\.teacher_logits: .*; give 'live'",
        ),
        (
            variant(**INT4, train={"hidden_weight": 0.5}),
            r"variants\.v: .*train\.hidden_weight is 0\.5: .*; set it to 0",
        ),
        (
            variant(**INT4, train={"attention_weight": 2}),
            r"variants\.v: .*train\.attention_weight is 2\.0: .*; set it to 0",
        ),
        (
            variant(bits=8, block_size=32, method="hqq"),
            r"variants\.v: .*bits 8: method 'hqq' has 4 bits only",
        ),
        (
            variant(**INT4, method="hqq", overrides={"lm_head": {"bits": 8, "block_size": 32}}),
            r"variants\.v: .*bits 8: method 'hqq' has 4 bits only",
        ),
        ({"variants": {"fp32": INT4}}, r"variants\.fp32 is always exported"),
        (
            {"tasks": {"max_train": 4}, "prune": {"num_texts": 8}},
            r"prune\.num_texts 8 exceeds tasks\.max_train 4",
        ),
        (
            cached("none"),
            r"distill\.phases\.1\.teacher_logits is 'cache', but cache\.kind is 'none'",
        ),
        (
            cached("top_k", temperature=2.0),
            r"distill\.phases\.1\.temperature 2\.0 .*'top_k' does not keep: set it to",
        ),
        (
            cached("random_sampling", temperature=0.5),
            r"distill\.phases\.1\.temperature 0\.5 .*'random_sampling' does not keep",
        ),
        (
            cached("random_sampling", temperature=1.0, divergence="jsd"),
            r"distill\.phases\.1\.divergence 'jsd' cannot be had from the draws",
        ),
        (
            {"student": "other/model", "distill": {"freeze_shared_layers": True}},
            r"distill.freeze_shared_layers true with student 'other/model'",
        ),
        (
            {"prune": {"kept_mlp_share": 0.5}, "distill": {"freeze_shared_layers": True}},
            r"distill.freeze_shared_layers true with prune\.kept_mlp_share 0\.5",
        ),
        (
            {"prune": {"first_candidate": 0}, "distill": {"freeze_shared_layers": True}},
            r"distill.freeze_shared_layers true with prune\.first_candidate 0: the lowest",
        ),
        (
            {"distill": {"freeze_shared_layers": True, "phases": [{}, {"hidden_weight": 0.5}]}},
            r"distill.freeze_shared_layers true with distill\.phases\.1\.hidden_weight 0\.5",
        ),
        (
            {"distill": {"freeze_shared_layers": True, "phases": [{"attention_weight": 2}]}},
            r"distill.freeze_shared_layers true with distill\.phases\.0\.attention_weight 2\.0",
        ),
    ],
)
def test_recipe_that_is_wrong_is_refused_by_the_name_of_the_setting(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml:\d+: {message}") as refused:
        load_config(write(tmp_path / "recipe.yaml", **sections))
    assert refused.value.exit_code == 2


def test_config_cannot_be_changed() -> None:
    config = ExportConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.teacher = "another"  # type: ignore[misc]
