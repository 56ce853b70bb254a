"""From measurements to what the manifest says of each variant, its gates and the default."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from bundle.manifest import Evaluation, Gate, Variant
from export.config import FLOAT_VARIANT, ExportConfig, ExportError
from export.evaluate import Agreement
from export.onnx_graph import DATA_FILE, OPSET
from export.quantize import float_matmuls
from export.speed import Speed

TEACHER, STUDENT = "teacher", "student"
TRANSFORMERS, TORCH = "teacher_transformers", "teacher_torch"
KL_UNIT = "nats per token"


class GateError(ExportError):
    """No variant passed its gates, so there is no bundle to serve."""

    exit_code = 3


def summarize(
    quality: Mapping[tuple[str, str], Agreement], speed: Mapping[str, Speed], num_prompts: int
) -> dict[str, Any]:
    """Return `eval/summary.json`: quality[reference][model], and speed[contender]."""
    nested: dict[str, dict[str, Any]] = {}
    for (reference, model), agreement in quality.items():
        nested.setdefault(reference, {})[model] = asdict(agreement)
    return {
        "num_prompts": num_prompts,
        "quality": nested,
        "speed": {name: asdict(value) for name, value in speed.items()},
    }


def describe_variant(
    name: str, folder: Path, config: ExportConfig, summary: Mapping[str, Any]
) -> Variant:
    """Return the manifest's entry of one variant, its gates judged."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    recipe = config.variants.get(name)
    quantized = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return Variant(
        precision=name if recipe is None else f"int{recipe.bits}",
        block_size=recipe.block_size if recipe else None,
        accuracy_level=recipe.accuracy_level if recipe else None,
        opset=OPSET,
        inputs=tuple(i.name for i in model.graph.input),
        outputs=tuple(o.name for o in model.graph.output),
        quantized_nodes={"MatMulNBits": len(quantized)} if quantized else {},
        float_matmuls=tuple(float_matmuls(model)),
        size_bytes=graph_size_bytes(folder),
        num_nodes=len(model.graph.node),
        gates=_gates(name, folder, config, summary["quality"]),
        metrics=_metrics(name, summary),
    )


def choose_default(variants: Mapping[str, Variant]) -> str:
    """Return the fastest variant, at one sequence, of those that passed every gate."""
    passed = {name: v for name, v in variants.items() if v.is_passed}
    if not passed:
        failed = "; ".join(
            f"{name}: {gate.name} {'nan' if gate.measured is None else gate.measured} "
            f"exceeds {gate.threshold} {gate.unit}"
            for name, variant in variants.items()
            for gate in variant.gates
            if not gate.passed
        )
        raise GateError(f"no variant passed its gates: {failed}")
    return max(passed, key=lambda name: passed[name].metrics["decode_tokens_per_s"])


def describe_evaluation(config: ExportConfig, summary: Mapping[str, Any]) -> Evaluation:
    """Return the manifest's record of what was measured, and how."""
    student = summary["quality"][TEACHER][STUDENT]
    values = {
        "student_kl": student["forward_kl"],
        "student_argmax_agreement": student["argmax_agreement"],
        "num_tokens": student["num_tokens"],
    }
    for name in (TRANSFORMERS, TORCH):
        values[f"{name}_tokens_per_s"] = summary["speed"][name]["decode_tokens_per_s"]
    return Evaluation(
        num_prompts=summary["num_prompts"],
        num_samples=1,
        k=(),
        temperature=config.sample.temperature,
        seed=config.sample.seed,
        values=values,
    )


def graph_size_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", DATA_FILE))


def _gates(
    name: str, folder: Path, config: ExportConfig, quality: Mapping[str, Any]
) -> tuple[Gate, ...]:
    kl_to_teacher = quality[TEACHER][name]["forward_kl"]
    gates = [_gate("kl_to_teacher", kl_to_teacher, config.gates.student_kl)]
    if name == FLOAT_VARIANT:
        parity = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
        gates.append(_gate("parity_with_torch", parity["max_mean_kl"], config.gates.onnx_kl))
    else:
        kl_to_student = quality[STUDENT][name]["forward_kl"]
        gates.append(_gate("kl_to_float_student", kl_to_student, config.gates.quantized_kl))
    return tuple(gates)


def _gate(name: str, measured: float, threshold: float) -> Gate:
    is_number = math.isfinite(measured)
    return Gate(
        name=name,
        measured=measured if is_number else None,
        threshold=threshold,
        passed=is_number and measured <= threshold,
        unit=KL_UNIT,
    )


def _metrics(name: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured; what came out as NaN or infinity is left out, as by the gates."""
    quality, speed = summary["quality"], summary["speed"]
    tokens_per_s = speed[name]["decode_tokens_per_s"]
    metrics = {
        "kl_to_teacher": quality[TEACHER][name]["forward_kl"],
        "argmax_agreement_with_teacher": quality[TEACHER][name]["argmax_agreement"],
        "kl_to_student": quality[STUDENT][name]["forward_kl"],
        "argmax_agreement_with_student": quality[STUDENT][name]["argmax_agreement"],
        "prefill_s": speed[name]["prefill_s"],
        "decode_tokens_per_s": tokens_per_s,
        "speedup_over_transformers": tokens_per_s / speed[TRANSFORMERS]["decode_tokens_per_s"],
        "speedup_over_torch_teacher": tokens_per_s / speed[TORCH]["decode_tokens_per_s"],
    }
    return {key: value for key, value in metrics.items() if math.isfinite(value)}
