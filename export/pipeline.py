"""The stages of an export and what each depends on: from a teacher's name to a verified bundle.

`Pipeline` describes every stage before anything runs (`export.run.stages.StageSpec`), which is what
`plan` and `status` read; `run` builds what is missing. `export.run.stage_names` lists the stages,
`export.builds` says what each does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from bundle.hashing import hash_json
from export.builds import StageBuilds
from export.inputs import RunInputs, open_inputs
from export.run.artifacts import Artifacts
from export.run.processes import World
from export.run.settings import ExportConfig
from export.run.stage_names import (
    ACCEPT,
    CACHE,
    DISTILL,
    EVALUATE,
    GRAPH,
    GRID,
    PACKAGE,
    PRETRAINED,
    PRUNE,
    SAMPLE,
    of_variant,
    split_name,
    stage_names,
    trained_variants,
)
from export.run.stages import RunReporter, Stage, StageRunner, StageSpec
from export.run.variants import FLOAT_VARIANT, HalfVariant, WeightOnlyVariant
from export.student.checkpoint import CHECKPOINTS
from export.teacher.grading import math_verify_version
from export.teacher.source import TeacherFolder
from export.teacher.task_sources import scorer_version
from serve.text.tokenizer_files import tells_date

BUNDLE_NAME = "bundle"


def run_export(config: ExportConfig, reporter: RunReporter) -> Path:
    """Run every stage that is not finished yet; returns the bundle's path.

    GateError when no variant passes its gates; ExportError and TeacherError name what to fix.
    """
    return open_pipeline(config, reporter).package()


def open_pipeline(
    config: ExportConfig,
    reporter: RunReporter,
    world: World | None = None,
    models: Sequence[TeacherFolder | None] = (),
) -> Pipeline:
    """Find or fetch the models and describe the stages; see `export.inputs.open_inputs`."""
    world = world or World()
    return Pipeline(open_inputs(config, reporter, world, models), reporter, world)


class Pipeline:
    """The stages of one recipe: each property describes one, `run` builds it."""

    def __init__(
        self, inputs: RunInputs, reporter: RunReporter, world: World | None = None
    ) -> None:
        self.inputs = inputs
        self.config = inputs.config
        self.reporter = reporter
        self.world = world or World()
        self.stages = StageRunner(self.config.output_dir / "work", reporter.say, self.world)

    # -- what there is ----------------------------------------------------------------------

    @property
    def specs(self) -> list[StageSpec]:
        """All stages but the bundle, in the order in which they run."""
        return [self.spec(name) for name in stage_names(self.config) if name != PACKAGE]

    def spec(self, name: str) -> StageSpec:
        """Return the stage of a name that `stage_names` lists."""
        kind, variant = split_name(name)
        by_kind = {
            GRAPH: lambda: self.graph(variant),
            GRID: lambda: self.trained(variant),
            SAMPLE: lambda: self.sampled,
            ACCEPT: lambda: self.accepted,
            CACHE: lambda: self.cached,
            PRUNE: lambda: self.untrained,
            PRETRAINED: lambda: self.untrained,
            DISTILL: lambda: self.distilled,
            EVALUATE: lambda: self.evaluated,
        }
        return by_kind[kind]()

    @cached_property
    def sampled(self) -> StageSpec:
        teacher = self.inputs.teacher
        settings = {
            "teacher": teacher.reference.weights_sha256,
            "teacher_files": dict(teacher.files),
            "sample": self.config.sample.model_dump(),
            "tasks": hash_json([asdict(task) for task in self.inputs.loaded.tasks]),
        }
        if tells_date(teacher.path):
            settings["template_date"] = self.inputs.template_date.isoformat()
        return StageSpec(
            SAMPLE, settings, (), lambda folder: self.builds.sample(folder),
            version=2, can_resume=True,
        )  # fmt: skip

    @cached_property
    def accepted(self) -> StageSpec:
        settings = self.config.accept.model_dump()
        if version := scorer_version(self.config.tasks):
            settings["reasoning_gym"] = version
        after = (self.sampled,)
        return StageSpec(ACCEPT, settings, after, lambda folder: self.builds.accept(folder))

    @cached_property
    def cached(self) -> StageSpec:
        return StageSpec(
            CACHE, self.config.cache.model_dump(), (self.accepted,),
            lambda folder: self.builds.cache(folder), can_resume=True,
        )  # fmt: skip

    @cached_property
    def untrained(self) -> StageSpec:
        """The student before its training: pruned, or a pretrained one."""
        after = (self.accepted,)
        if self.config.student is None:
            settings: dict[str, Any] = self.config.prune.model_dump()
            return StageSpec(
                PRUNE, settings, after, lambda folder: self.builds.prune(folder), version=2
            )
        student = self.inputs.student
        assert student is not None, "yet to be fetched"
        settings = {"sha256": student.reference.weights_sha256, "files": dict(student.files)}
        return StageSpec(PRETRAINED, settings, after, lambda folder: self.builds.pretrained(folder))

    @cached_property
    def distilled(self) -> StageSpec:
        config = self.config
        cached = (self.cached,) if config.reads_cache else ()
        settings = config.distill.model_dump(exclude={"checkpoint_every_s"})
        if any(phase.data == "student" for phase in config.distill.phases):
            settings["sample"] = config.sample.model_dump()
        return StageSpec(
            DISTILL, settings, (self.accepted, self.untrained, *cached),
            lambda folder: self.builds.distill(folder),
            version=2, can_resume=True, is_distributed=True, scratch=(CHECKPOINTS,),
        )  # fmt: skip

    def trained(self, variant: str) -> StageSpec:
        """Return the stage that trains the student on a variant's grid."""
        config = self.config.variants[variant]
        assert isinstance(config, WeightOnlyVariant) and config.train, variant
        return StageSpec(
            of_variant(GRID, variant), config.model_dump(exclude={"accuracy_level"}),
            (self.accepted, self.graph(FLOAT_VARIANT)),
            lambda folder: self.builds.grid(variant, folder),
            can_resume=True, is_distributed=True, scratch=(CHECKPOINTS,),
        )  # fmt: skip

    def graph(self, variant: str) -> StageSpec:
        """Return the stage that writes a variant's graph."""
        name = of_variant(GRAPH, variant)
        if variant == FLOAT_VARIANT:
            settings = self.config.onnx.model_dump()
            after: tuple[StageSpec, ...] = (self.distilled,)
            return StageSpec(name, settings, after, lambda folder: self.builds.float_graph(folder))
        is_trained = variant in trained_variants(self.config)
        before = self.trained(variant) if is_trained else self.accepted
        return StageSpec(
            name, self.config.variants[variant].model_dump(), (self.graph(FLOAT_VARIANT), before),
            lambda folder: self.builds.variant(variant, folder), version=2,
        )  # fmt: skip

    @property
    def graphs(self) -> dict[str, StageSpec]:
        """The stage of every variant's graph, the float one first."""
        return {name: self.graph(name) for name in (FLOAT_VARIANT, *self.config.variants)}

    @cached_property
    def evaluated(self) -> StageSpec:
        settings = self.config.evaluate.model_dump() | {"math_verify": math_verify_version()}
        return StageSpec(
            EVALUATE, settings, (self.accepted, *self.graphs.values()),
            lambda folder: self.builds.evaluation(folder), version=3,
        )  # fmt: skip

    # -- running ----------------------------------------------------------------------------

    @cached_property
    def artifacts(self) -> Artifacts:
        """Where the stages leave what they make."""
        config = self.config
        return Artifacts(
            sampled=self.path(self.sampled),
            accepted=self.path(self.accepted),
            cached=None if config.cache.kind == "none" else self.path(self.cached),
            untrained=self.path(self.untrained),
            student=self.path(self.distilled),
            trained={name: self.path(self.trained(name)) for name in trained_variants(config)},
            graphs={name: self.path(spec) for name, spec in self.graphs.items()},
            measured=tuple(name for name in self.graphs if not self._needs_gpu(name)),
            evaluation=self.path(self.evaluated),
        )

    @cached_property
    def builds(self) -> StageBuilds:
        return StageBuilds(self.inputs, self.artifacts, self.reporter, self.world)

    def path(self, spec: StageSpec) -> Path:
        """Return the folder of a stage, finished or not."""
        return self.stages.path(spec)

    def run(self, spec: StageSpec) -> Stage:
        """Return a stage, building it and what comes before it where that is missing."""
        return self.stages.run(spec)

    def package(self) -> Path:
        """Run what is missing and return the bundle's path; see `export.publish.bundle`."""
        for spec in self.specs:
            if self.stages.find(spec):
                self.reporter.say(f"{spec.name}: finished before, in {self.path(spec)}")
            self.run(spec)
        target = self.config.output_dir / BUNDLE_NAME
        if self.world.is_main:
            self._publish(target)
        self.world.wait()
        return target

    def _publish(self, target: Path) -> None:
        from export.publish.bundle import publish
        from export.publish.finished import FinishedRun

        records = tuple(self.stages.finished(spec).record for spec in self.specs)
        run = FinishedRun(self.config, self.inputs.teacher, self.artifacts, records)
        publish(run, target, self.reporter.say)

    def _needs_gpu(self, variant: str) -> bool:
        config = self.config.variants.get(variant)
        return isinstance(config, HalfVariant) and config.method == "bfloat16"
