"""The stages of a recipe by name, in the order in which they run: this list stands here alone.

sample → accept → (cache) → prune → distill → onnx-fp32 → (grid-V →) onnx-V → evaluate → package
"""

from __future__ import annotations

from export.run.settings import ExportConfig
from export.run.variants import FLOAT_VARIANT, WeightOnlyVariant

SAMPLE, ACCEPT, CACHE, DISTILL, EVALUATE = "sample", "accept", "cache", "distill", "evaluate"
PRUNE, PRETRAINED = "prune", "student"  # one of them makes the student
GRAPH, GRID = "onnx", "grid"  # of a variant
PACKAGE = "package"
_KEEP_MODELS = (PRUNE, PRETRAINED, DISTILL, GRAPH, GRID, PACKAGE)


def of_variant(kind: str, variant: str) -> str:
    """Return the name of a variant's stage: "onnx-int8"."""
    return f"{kind}-{variant}"


def split_name(name: str) -> tuple[str, str]:
    """Return a stage's kind and its variant, "" where it is of none.

    >>> split_name("onnx-int8"), split_name("sample")
    (('onnx', 'int8'), ('sample', ''))
    """
    kind, _, variant = name.partition("-")
    return kind, variant


def trained_variants(config: ExportConfig) -> list[str]:
    """Return the variants for which the student is trained on the grid."""
    return [
        name
        for name, variant in config.variants.items()
        if isinstance(variant, WeightOnlyVariant) and variant.train
    ]


def stage_names(config: ExportConfig) -> list[str]:
    """Return the names of all stages in the order in which they run, the bundle last."""
    cached = [CACHE] if config.cache.kind != "none" else []
    student = PRUNE if config.student is None else PRETRAINED
    names = [SAMPLE, ACCEPT, *cached, student, DISTILL, of_variant(GRAPH, FLOAT_VARIANT)]
    trained = trained_variants(config)
    for variant in config.variants:
        if variant in trained:
            names.append(of_variant(GRID, variant))
        names.append(of_variant(GRAPH, variant))
    return [*names, EVALUATE, PACKAGE]


def keeps_model(name: str) -> bool:
    """Say whether a stage leaves a model on disk."""
    return split_name(name)[0] in _KEEP_MODELS
