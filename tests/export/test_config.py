from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from export.config import ExportConfig, ExportError, load_config

RECIPES = sorted(Path("export/recipes").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"teacher": "some/model", "output_dir": "runs/x"}


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return path


def test_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "recipe.yaml"))
    assert (config.distill.alpha, config.distill.temperature) == (0.5, 2.0)
    assert config.gates.model_dump() == {
        "onnx_kl": 1e-6,
        "quantized_kl": 0.02,
        "student_kl": 0.40,
    }
    shown = {n: (v.bits, v.block_size, v.accuracy_level) for n, v in config.variants.items()}
    assert shown == {"int8": (8, 128, 4), "int4": (4, 32, 4)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_that_are_shipped_load(recipe: Path) -> None:
    assert load_config(recipe).teacher


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teachr": "x"}, r"teachr: Extra inputs are not permitted, got 'x'"),
        ({"distill": {"alhpa": 0.5}}, r"distill\.alhpa: Extra inputs are not permitted, got 0\.5"),
        ({"distill": {"alpha": 1.5}}, r"distill\.alpha: .*less than or equal to 1, got 1\.5"),
        ({"distill": {"temperature": 0}}, r"distill\.temperature: .*greater than 0, got 0"),
        ({"distill": {"learning_rate": float("nan")}}, r"distill\.learning_rate: .*got nan"),
        ({"sample": {"dtype": "int3"}}, r"sample\.dtype: .*'bfloat16' or 'float32', got 'int3'"),
        ({"tasks": {"max_test": 0}}, r"tasks\.max_test: .*greater than 0, got 0"),
        ({"gates": {"quantized_kl": -1}}, r"gates\.quantized_kl: .*greater than or equal to 0"),
        (
            {"variants": {"int3": {"bits": 3, "block_size": 32}}},
            r"variants\.int3\.bits: Input should be 4 or 8, got 3",
        ),
        ({"variants": {"int8": {"bits": 8}}}, r"variants\.int8\.block_size: Field required"),
        (
            {"variants": {"fp32": {"bits": 8, "block_size": 32}}},
            r"the file: Value error, variants: 'fp32' is always exported",
        ),
        ({"variants": {"Int 8": {"bits": 8, "block_size": 32}}}, r"variants\.Int 8"),
        (
            {"tasks": {"max_train": 4}, "prune": {"num_texts": 8}},
            r"the file: Value error, prune\.num_texts 8 exceeds tasks\.max_train 4",
        ),
        ({"output_dir": None}, r"output_dir: .*, got None"),
    ],
)
def test_wrong_key_or_value_fails_by_name(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=rf"recipe\.yaml: {message}"):
        load_config(write(tmp_path / "recipe.yaml", **sections))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"recipe\.yaml: the file: .*dictionary"),
        ("- teacher", r"recipe\.yaml: the file: .*dictionary"),
        ("teacher: [", r"recipe\.yaml is not YAML: "),
        ("output_dir: x", r"recipe\.yaml: teacher: Field required"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ExportError, match=message):
        load_config(path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"teacher: \xff\xfe")
    with pytest.raises(ExportError, match=r"recipe\.yaml is not YAML: "):
        load_config(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"recipe\.yaml cannot be read: No such file"):
        load_config(tmp_path / "recipe.yaml")


def test_config_cannot_be_changed() -> None:
    config = ExportConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.teacher = "another"  # type: ignore[misc]
