from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bundle.manifest import Gate, Variant
from export.graph.parity import PARITY_NAME
from export.measure.summary import STUDENT, TEACHER, TORCH, TRANSFORMERS, EvalSummary, Speed
from export.publish.gates import describe_evaluation, describe_variant, task_values
from export.run.settings import ExportConfig, GatesConfig, SampleConfig
from export.run.training import PhaseConfig
from export.run.variants import (
    DynamicVariant,
    HalfVariant,
    StaticVariant,
    VariantConfig,
    WeightOnlyVariant,
)
from tests.support.export.measured import make_quality, make_summary, make_tasks

SMALL = WeightOnlyVariant(bits=8, block_size=32, accuracy_level=1)
GATES = GatesConfig(
    onnx_kl=1e-6, onnx_logit_difference=1e-3, quantized_kl=0.02, trained_kl=0.05, student_kl=0.4
)
NOT_A_NUMBER = [math.nan, math.inf, -math.inf, None]
Describe = Callable[..., Variant]


def make_config(small: VariantConfig = SMALL) -> ExportConfig:
    return ExportConfig(
        teacher="unused",
        output_dir=Path("unused"),
        sample=SampleConfig(temperature=0.7, seed=3),
        variants={"small": small},
        gates=GATES,
    )


def measured(kl_to_teacher: float | None = 0.3, kl_to_student: float | None = 0.01) -> EvalSummary:
    names = ("fp32", "small")
    to_teacher = make_quality(kl_to_teacher, argmax_agreement=0.7, num_tokens=100)
    to_student = make_quality(kl_to_student, argmax_agreement=0.9, num_tokens=100)
    speed = {name: Speed(0.5, 80.0) for name in names}
    return make_summary(
        num_prompts=12,
        quality={
            TEACHER: dict.fromkeys((*names, STUDENT), to_teacher),
            STUDENT: dict.fromkeys((*names, TEACHER), to_student),
        },
        perplexity=dict.fromkeys((*names, TEACHER, STUDENT), 12.5),
        speed=speed | {TORCH: Speed(0.5, 40.0), TRANSFORMERS: Speed(0.5, 20.0)},
        memory=dict.fromkeys(names, 1_000_000),
    )


@pytest.fixture
def describe(exported_llama: Any, tmp_path: Path) -> Describe:
    """Describe "fp32" or "small", which is an int8 graph."""
    graphs = {"fp32": exported_llama.variants["fp32"], "small": exported_llama.variants["int8"]}
    for name, source in graphs.items():
        (tmp_path / name).mkdir()
        for file in ("model.onnx", "model.onnx.data"):
            (tmp_path / name / file).symlink_to(source / file)

    def describe(
        name: str,
        *,
        small: VariantConfig = SMALL,
        parity_kl: float | None = 1e-9,
        logit_difference: float | None = 1e-4,
        summary: EvalSummary | None = None,
        **changes: float | None,
    ) -> Variant:
        parity = {"max_mean_kl": parity_kl, "max_logit_difference": logit_difference}
        (tmp_path / "fp32" / PARITY_NAME).write_text(json.dumps(parity))
        found = summary or measured(**changes)
        return describe_variant(name, tmp_path / name, make_config(small), found)

    return describe


def gates(variant: Variant) -> dict[str, Gate]:
    return {gate.name: gate for gate in variant.gates}


# --- gates


def test_float_variant_is_judged_by_parity_and_by_the_teacher(
    describe: Describe,
) -> None:
    found = {n: (g.measured, g.threshold, g.passed) for n, g in gates(describe("fp32")).items()}
    assert found == {
        "kl_to_teacher": (0.3, 0.4, True),
        "parity_with_torch": (1e-9, 1e-6, True),
        "logit_difference": (1e-4, 1e-3, True),
    }
    units = {name: gate.unit for name, gate in gates(describe("fp32")).items()}
    assert units == {
        "kl_to_teacher": "nats per token",
        "parity_with_torch": "nats per token",
        "logit_difference": "logits",
    }


def test_quantized_variant_is_judged_by_the_float_student_and_by_the_teacher(
    describe: Describe,
) -> None:
    found = {n: (g.measured, g.threshold, g.passed) for n, g in gates(describe("small")).items()}
    assert found == {
        "kl_to_teacher": (0.3, 0.4, True),
        "kl_to_float_student": (0.01, 0.02, True),
    }


def test_variant_trained_on_its_grid_has_a_threshold_of_its_own(describe: Describe) -> None:
    trained = SMALL.model_copy(update={"train": PhaseConfig()})
    gate = gates(describe("small", small=trained, kl_to_student=0.03))["kl_to_float_student"]
    assert (gate.threshold, gate.passed) == (0.05, True)
    assert not describe("small", kl_to_student=0.03).is_passed


@pytest.mark.parametrize("measured", [0.02, 0.0])
def test_measurement_at_its_threshold_or_below_passes(describe: Describe, measured: float) -> None:
    assert describe("small", kl_to_student=measured).is_passed


@pytest.mark.parametrize(
    ("name", "changes", "failed"),
    [
        ("fp32", {"parity_kl": 1.1e-6}, "parity_with_torch"),
        ("fp32", {"logit_difference": 1.1e-3}, "logit_difference"),
        ("fp32", {"kl_to_teacher": 0.41}, "kl_to_teacher"),
        ("small", {"kl_to_student": 0.021}, "kl_to_float_student"),
        ("small", {"kl_to_teacher": 0.41}, "kl_to_teacher"),
    ],
)
def test_measurement_above_its_threshold_fails_its_gate_alone(
    describe: Describe, name: str, changes: dict[str, float], failed: str
) -> None:
    variant = describe(name, **changes)
    assert [gate.name for gate in variant.gates if not gate.passed] == [failed]
    assert not variant.is_passed


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_what_is_not_a_number_never_passes(describe: Describe, value: float | None) -> None:
    for name, changes in [
        ("fp32", {"parity_kl": value}),
        ("fp32", {"logit_difference": value}),
        ("fp32", {"kl_to_teacher": value}),
        ("small", {"kl_to_teacher": value}),
        ("small", {"kl_to_student": value}),
    ]:
        (failed,) = [gate for gate in describe(name, **changes).gates if not gate.passed]
        assert failed.measured is None


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_metric_that_is_not_a_number_is_left_out(describe: Describe, value: float | None) -> None:
    metrics = describe("small", kl_to_student=value).metrics
    assert "kl_to_student" not in metrics
    assert metrics["kl_to_teacher"] == 0.3


def test_variant_that_was_not_measured_has_not_passed_and_has_no_metrics(
    describe: Describe,
) -> None:
    """As bfloat16 on a machine without a GPU: the graph is described all the same."""
    full = measured()
    quality = {reference: {"fp32": of["fp32"]} for reference, of in full.quality.items()}
    summary = replace(full, quality=quality, memory={"fp32": 1})
    variant = describe("small", small=HalfVariant(method="bfloat16"), summary=summary)
    assert (variant.gates, variant.metrics, variant.is_passed) == ((), {}, False)
    assert (variant.precision, variant.block_size) == ("bfloat16", None)
    assert variant.size_bytes > 0 and variant.num_nodes > 0


# --- what the manifest says


@pytest.mark.parametrize(
    ("small", "precision", "block_size", "accuracy_level"),
    [
        (WeightOnlyVariant(bits=4, block_size=16), "int4", 16, 4),
        (DynamicVariant(method="dynamic"), "int8", None, None),
        (StaticVariant(method="static"), "int8", None, None),
        (HalfVariant(method="float16"), "float16", None, None),
    ],
)
def test_precision_is_that_of_the_recipe(
    describe: Describe,
    small: VariantConfig,
    precision: str,
    block_size: int | None,
    accuracy_level: int | None,
) -> None:
    variant = describe("small", small=small)
    found = (variant.precision, variant.block_size, variant.accuracy_level)
    assert found == (precision, block_size, accuracy_level)


def test_variant_is_described_from_its_graph(describe: Describe, exported_llama: Any) -> None:
    folder = exported_llama.variants["int8"]
    variant = describe("small")
    assert (variant.precision, variant.block_size, variant.accuracy_level) == ("int8", 32, 1)
    assert variant.inputs[:2] == ("input_ids", "attention_mask")
    assert variant.outputs[0] == "logits"
    assert variant.quantized_nodes == {"MatMulNBits": 26}
    assert variant.float_matmuls == ()
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert variant.size_bytes == sum(sizes)
    assert variant.num_nodes == 66


def test_float_variant_has_no_quantization(describe: Describe) -> None:
    variant = describe("fp32")
    assert (variant.precision, variant.block_size, variant.accuracy_level) == ("fp32", None, None)
    assert variant.quantized_nodes == {}
    assert len(variant.float_matmuls) == 26
    assert "/lm_head/MatMul" in variant.float_matmuls, "the tied head is one of them"


def test_metrics_are_those_of_the_summary(describe: Describe) -> None:
    assert describe("small").metrics == {
        "kl_to_teacher": 0.3,
        "argmax_agreement_with_teacher": 0.7,
        "kl_to_student": 0.01,
        "argmax_agreement_with_student": 0.9,
        "perplexity": 12.5,
        "prefill_s": 0.5,
        "decode_tokens_per_s": 80.0,
        "speedup_over_transformers": 4.0,
        "speedup_over_torch_teacher": 2.0,
        "peak_memory_bytes": 1_000_000,
    }


def test_metrics_have_the_task_scores_where_there_are_tasks(describe: Describe) -> None:
    summary = replace(measured(), tasks=make_tasks(4, {"small": {1: 0.25, 2: 0.5}}))
    metrics = describe("small", summary=summary).metrics
    expected = {"pass_at_1": 0.25, "pass_at_2": 0.5, "maj_at_4": 0.25}
    assert expected == task_values(summary, "small") == {k: metrics[k] for k in expected}


def test_evaluation_without_tasks_has_one_sample_of_each_prompt() -> None:
    evaluation = describe_evaluation(make_config(), measured())
    assert (evaluation.num_prompts, evaluation.num_samples, evaluation.k) == (12, 1, ())
    assert (evaluation.temperature, evaluation.seed) == (0.7, 3)
    assert evaluation.values == {
        "student_kl": 0.3,
        "student_argmax_agreement": 0.7,
        "num_tokens": 100,
        "teacher_transformers_tokens_per_s": 20.0,
        "teacher_torch_tokens_per_s": 40.0,
    }


def test_evaluation_with_tasks_has_the_scores_of_both_models() -> None:
    tasks = make_tasks(8, {TEACHER: {1: 0.5, 2: 0.75}, STUDENT: {1: 0.25, 2: 0.5}})
    evaluation = describe_evaluation(make_config(), replace(measured(), tasks=tasks))
    assert (evaluation.num_samples, evaluation.k) == (8, (1, 8))
    found = {key: value for key, value in evaluation.values.items() if "_at_" in key}
    assert found == {
        "teacher_pass_at_1": 0.5,
        "teacher_pass_at_2": 0.75,
        "teacher_maj_at_8": 0.5,
        "student_pass_at_1": 0.25,
        "student_pass_at_2": 0.5,
        "student_maj_at_8": 0.25,
    }


def test_evaluation_leaves_out_what_is_not_a_number() -> None:
    values = describe_evaluation(make_config(), measured(kl_to_teacher=None)).values
    assert "student_kl" not in values
    assert values["student_argmax_agreement"] == 0.7
