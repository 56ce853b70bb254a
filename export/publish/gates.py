"""From measurements to what the manifest says of each variant, its gates and the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from bundle.manifest import Evaluation, Gate, Variant
from export.graph.parity import PARITY_NAME
from export.graph.quantize import float_matmuls, quantized_node_counts
from export.graph.surgery import OPSET, graph_size_bytes
from export.measure.summary import (
    KL_METRIC,
    SPEED_METRIC,
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    EvalSummary,
)
from export.run.files import read_json
from export.run.settings import ExportConfig
from export.run.variants import FLOAT_VARIANT, WeightOnlyVariant

KL_UNIT, LOGIT_UNIT = "nats per token", "logits"


def describe_variant(
    name: str, folder: Path, config: ExportConfig, summary: EvalSummary
) -> Variant:
    """Return the manifest's entry of one variant, its gates judged.

    One that this machine could not run has no gates and no metrics, so it has not passed.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    recipe = config.variants.get(name)
    blockwise = recipe if isinstance(recipe, WeightOnlyVariant) else None
    is_measured = summary.quality_of(TEACHER, name) is not None
    return Variant(
        precision=_precision(name, recipe),
        block_size=blockwise.block_size if blockwise else None,
        accuracy_level=blockwise.accuracy_level if blockwise else None,
        opset=OPSET,
        inputs=tuple(i.name for i in model.graph.input),
        outputs=tuple(o.name for o in model.graph.output),
        quantized_nodes=quantized_node_counts(model),
        float_matmuls=tuple(float_matmuls(model)),
        size_bytes=graph_size_bytes(folder),
        num_nodes=len(model.graph.node),
        gates=_gates(name, folder, config, summary) if is_measured else (),
        metrics=_metrics(name, summary) if is_measured else {},
    )


def describe_evaluation(config: ExportConfig, summary: EvalSummary) -> Evaluation:
    """Return the manifest's record of what was measured of the float student, and how."""
    student = summary.quality[TEACHER][STUDENT]
    values = {
        "student_kl": student.forward_kl,
        "student_argmax_agreement": student.argmax_agreement,
        "num_tokens": student.num_tokens,
    }
    for name in (TRANSFORMERS, TORCH):
        values[f"{name}_tokens_per_s"] = summary.speed[name].decode_tokens_per_s
    for name in (TEACHER, STUDENT):
        for key, value in task_values(summary, name).items():
            values[f"{name}_{key}"] = value
    return Evaluation(
        num_prompts=summary.num_prompts,
        num_samples=config.evaluate.num_samples if summary.tasks else 1,
        k=config.evaluate.k if summary.tasks else (),
        temperature=config.sample.temperature,
        seed=config.sample.seed,
        values=_finite(values),
    )


def task_values(summary: EvalSummary, model: str) -> dict[str, float | None]:
    """Return a model's pass@k and maj@n over all tasks, by name; empty without tasks."""
    if summary.tasks is None:
        return {}
    overall = summary.tasks.models[model].overall
    values: dict[str, float | None] = {
        f"pass_at_{k}": estimate.value for k, estimate in overall.pass_at_k.items()
    }
    values[f"maj_at_{summary.tasks.num_samples}"] = overall.majority_at_n.value
    return values


def _precision(name: str, recipe: Any) -> str:
    if recipe is None:
        return name
    if isinstance(recipe, WeightOnlyVariant):
        return f"int{recipe.bits}"
    method: str = recipe.method
    return {"dynamic": "int8", "static": "int8"}.get(method, method)


def _gates(name: str, folder: Path, config: ExportConfig, summary: EvalSummary) -> tuple[Gate, ...]:
    gates, quality = config.gates, summary.quality
    found = [_gate("kl_to_teacher", quality[TEACHER][name].forward_kl, gates.student_kl)]
    if name == FLOAT_VARIANT:
        parity = read_json(folder / PARITY_NAME)
        difference = parity["max_logit_difference"]
        found.append(_gate("parity_with_torch", parity["max_mean_kl"], gates.onnx_kl))
        found.append(_gate("logit_difference", difference, gates.onnx_logit_difference, LOGIT_UNIT))
        return tuple(found)
    recipe = config.variants[name]
    is_trained = isinstance(recipe, WeightOnlyVariant) and recipe.train is not None
    threshold = gates.trained_kl if is_trained else gates.quantized_kl
    return (*found, _gate("kl_to_float_student", quality[STUDENT][name].forward_kl, threshold))


def _gate(name: str, measured: float | None, threshold: float, unit: str = KL_UNIT) -> Gate:
    """Judge one number; what is not finite (in JSON: null) fails."""
    is_number = measured is not None and math.isfinite(measured)
    return Gate(
        name=name,
        measured=measured if is_number else None,
        threshold=threshold,
        passed=is_number and measured is not None and measured <= threshold,
        unit=unit,
    )


def _metrics(name: str, summary: EvalSummary) -> dict[str, float]:
    """Return what was measured; what came out as NaN or infinity is left out, as by the gates."""
    to_teacher, to_student = summary.quality[TEACHER][name], summary.quality[STUDENT][name]
    tokens_per_s = summary.speed[name].decode_tokens_per_s
    by_transformers, by_torch = (summary.speed[n] for n in (TRANSFORMERS, TORCH))
    return _finite(
        {
            KL_METRIC: to_teacher.forward_kl,
            "argmax_agreement_with_teacher": to_teacher.argmax_agreement,
            "kl_to_student": to_student.forward_kl,
            "argmax_agreement_with_student": to_student.argmax_agreement,
            "perplexity": summary.perplexity[name],
            **task_values(summary, name),
            "prefill_s": summary.speed[name].prefill_s,
            SPEED_METRIC: tokens_per_s,
            "speedup_over_transformers": tokens_per_s / by_transformers.decode_tokens_per_s,
            "speedup_over_torch_teacher": tokens_per_s / by_torch.decode_tokens_per_s,
            "peak_memory_bytes": summary.memory[name],
        }
    )


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
