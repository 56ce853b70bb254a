"""Where the stages of a run leave what they make, for the stages that read it.

The folders follow from the recipe and its inputs, so they are known before they are there. What a
folder holds, and under which names, is its writer's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifacts:
    """The folders of a run's stages.

    sampled     the teacher's completions (`export.teacher.sample`)
    accepted    those that are trained on and measured (`export.teacher.accept`)
    cached      the teacher's logits (`export.student.logits_cache`); None without a cache
    untrained   the student as pruning or its checkpoint leaves it (`export.student.prune`)
    student     the student behind its training (`export.student.phases`)
    trained     variant → the student trained on its grid (`export.student.grid_training`)
    graphs      variant → its ONNX graph, the float one first (`export.graph`)
    measured    the variants whose graphs run on this machine's CPU
    evaluation  what was measured (`export.measure.stage`)
    """

    sampled: Path
    accepted: Path
    cached: Path | None
    untrained: Path
    student: Path
    trained: Mapping[str, Path]
    graphs: Mapping[str, Path]
    measured: tuple[str, ...]
    evaluation: Path

    @property
    def measured_graphs(self) -> dict[str, Path]:
        """The graphs that `evaluate` runs."""
        return {name: self.graphs[name] for name in self.measured}
