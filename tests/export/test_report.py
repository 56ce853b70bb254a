from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.manifest import Gate, Variant
from export.config import ExportConfig, GatesConfig, VariantConfig
from export.evaluate import Agreement
from export.report import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    GateError,
    choose_default,
    describe_evaluation,
    describe_variant,
    summarize,
)
from export.speed import Speed

CONFIG = ExportConfig(
    teacher="unused",
    output_dir=Path("unused"),
    variants={"small": VariantConfig(bits=8, block_size=32, accuracy_level=1)},
    gates=GatesConfig(onnx_kl=1e-6, quantized_kl=0.02, student_kl=0.4),
)
NOT_A_NUMBER = [math.nan, math.inf, -math.inf]


def make_variant(measured: float | None, tokens_per_s: float = 1.0, threshold: float = 0.02) -> Any:
    passed = measured is not None and measured <= threshold
    gate = Gate(name="kl", measured=measured, threshold=threshold, passed=passed, unit="nats")
    return Variant(
        precision="int8",
        opset=18,
        inputs=("input_ids",),
        outputs=("logits",),
        size_bytes=1,
        num_nodes=1,
        gates=(gate,),
        metrics={"decode_tokens_per_s": tokens_per_s},
    )


def make_summary(kl_to_teacher: float = 0.3, kl_to_student: float = 0.01) -> dict[str, Any]:
    names = ("fp32", "small")
    quality = {(TEACHER, name): Agreement(kl_to_teacher, 0.7, 100) for name in (*names, STUDENT)}
    quality |= {(STUDENT, name): Agreement(kl_to_student, 0.9, 100) for name in (*names, TEACHER)}
    speed = {name: Speed(0.5, 80.0) for name in names}
    speed |= {TORCH: Speed(0.5, 40.0), TRANSFORMERS: Speed(0.5, 20.0)}
    return summarize(quality, speed, num_prompts=12)


@pytest.fixture
def describe(exported_llama: Any) -> Callable[..., Variant]:
    """Describe "fp32" or "small", which is an int8 graph."""
    folders = {"fp32": exported_llama.variants["fp32"], "small": exported_llama.variants["int8"]}

    def describe(name: str, parity_kl: float = 1e-9, **changes: float) -> Variant:
        parity = {"max_mean_kl": parity_kl, "max_logit_difference": 0.0, "num_positions": 1}
        (folders["fp32"] / "parity.json").write_text(json.dumps(parity))
        return describe_variant(name, folders[name], CONFIG, make_summary(**changes))

    return describe


def gates(variant: Variant) -> dict[str, Gate]:
    return {gate.name: gate for gate in variant.gates}


# --- the default


def test_default_is_the_fastest_that_passed() -> None:
    variants = {
        "fp32": make_variant(0.0, tokens_per_s=10.0),
        "int8": make_variant(0.01, tokens_per_s=30.0),
        "int4": make_variant(0.5, tokens_per_s=90.0),
    }
    assert choose_default(variants) == "int8"


def test_variant_at_its_threshold_has_passed() -> None:
    assert choose_default({"int8": make_variant(0.02, threshold=0.02)}) == "int8"


def test_variant_without_gates_has_not_passed() -> None:
    untested = make_variant(0.0, tokens_per_s=99.0).model_copy(update={"gates": ()})
    assert choose_default({"a": untested, "b": make_variant(0.0)}) == "b"


def test_no_default_names_every_gate_that_failed() -> None:
    variants = {"fp32": make_variant(0.5), "int8": make_variant(None)}
    with pytest.raises(GateError) as failure:
        choose_default(variants)
    assert str(failure.value) == (
        "no variant passed its gates: fp32: kl 0.5 exceeds 0.02 nats; "
        "int8: kl nan exceeds 0.02 nats"
    )


# --- gates


def test_float_variant_is_judged_by_parity_and_by_the_teacher(
    describe: Callable[..., Variant],
) -> None:
    found = {n: (g.measured, g.threshold, g.passed) for n, g in gates(describe("fp32")).items()}
    assert found == {
        "kl_to_teacher": (0.3, 0.4, True),
        "parity_with_torch": (1e-9, 1e-6, True),
    }


def test_quantized_variant_is_judged_by_the_float_student_and_by_the_teacher(
    describe: Callable[..., Variant],
) -> None:
    found = {n: (g.measured, g.threshold, g.passed) for n, g in gates(describe("small")).items()}
    assert found == {
        "kl_to_teacher": (0.3, 0.4, True),
        "kl_to_float_student": (0.01, 0.02, True),
    }


@pytest.mark.parametrize(
    ("name", "changes", "failed"),
    [
        ("fp32", {"parity_kl": 1.1e-6}, "parity_with_torch"),
        ("fp32", {"kl_to_teacher": 0.41}, "kl_to_teacher"),
        ("small", {"kl_to_student": 0.021}, "kl_to_float_student"),
        ("small", {"kl_to_teacher": 0.41}, "kl_to_teacher"),
    ],
)
def test_measurement_above_its_threshold_fails_its_gate_alone(
    describe: Callable[..., Variant], name: str, changes: dict[str, float], failed: str
) -> None:
    variant = describe(name, **changes)
    assert [gate.name for gate in variant.gates if not gate.passed] == [failed]
    assert not variant.is_passed


@pytest.mark.parametrize("value", NOT_A_NUMBER)
def test_what_is_not_a_number_never_passes(describe: Callable[..., Variant], value: float) -> None:
    for name, changes in [
        ("fp32", {"parity_kl": value}),
        ("fp32", {"kl_to_teacher": value}),
        ("small", {"kl_to_teacher": value}),
        ("small", {"kl_to_student": value}),
    ]:
        (failed,) = [gate for gate in describe(name, **changes).gates if not gate.passed]
        assert failed.measured is None


def test_metric_that_is_not_a_number_is_left_out(describe: Callable[..., Variant]) -> None:
    metrics = describe("small", kl_to_student=math.nan).metrics
    assert "kl_to_student" not in metrics
    assert metrics["kl_to_teacher"] == 0.3


# --- what the manifest says


def test_variant_is_described_from_its_graph(
    describe: Callable[..., Variant], exported_llama: Any
) -> None:
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


def test_float_variant_has_no_quantization(describe: Callable[..., Variant]) -> None:
    variant = describe("fp32")
    assert (variant.precision, variant.block_size, variant.accuracy_level) == ("fp32", None, None)
    assert variant.quantized_nodes == {}
    assert len(variant.float_matmuls) == 26
    assert "/lm_head/MatMul" in variant.float_matmuls, "the tied head is one of them"


def test_metrics_are_those_of_the_summary(describe: Callable[..., Variant]) -> None:
    assert describe("small").metrics == {
        "kl_to_teacher": 0.3,
        "argmax_agreement_with_teacher": 0.7,
        "kl_to_student": 0.01,
        "argmax_agreement_with_student": 0.9,
        "prefill_s": 0.5,
        "decode_tokens_per_s": 80.0,
        "speedup_over_transformers": 4.0,
        "speedup_over_torch_teacher": 2.0,
    }


def test_evaluation_names_its_settings() -> None:
    evaluation = describe_evaluation(CONFIG, make_summary())
    assert (evaluation.num_prompts, evaluation.num_samples, evaluation.k) == (12, 1, ())
    assert (evaluation.temperature, evaluation.seed) == (0.8, 0)
    assert evaluation.values == {
        "student_kl": 0.3,
        "student_argmax_agreement": 0.7,
        "num_tokens": 100,
        "teacher_transformers_tokens_per_s": 20.0,
        "teacher_torch_tokens_per_s": 40.0,
    }


def test_summary_is_nested_by_reference_and_survives_json() -> None:
    summary = make_summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["quality"][TEACHER]["small"] == {
        "forward_kl": 0.3,
        "argmax_agreement": 0.7,
        "num_tokens": 100,
    }
    assert summary["speed"]["small"] == {"prefill_s": 0.5, "decode_tokens_per_s": 80.0}
