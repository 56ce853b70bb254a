"""The stages of an export and what each depends on: from a teacher's name to a verified bundle.

    sample → accept → (cache) → prune → distill → onnx-fp32 → (grid-V →) onnx-V → evaluate → package

`Pipeline` describes every stage before anything runs (`export.run.stages.StageSpec`), which is what
`plan` and `status` read; `run` builds what is missing. What a stage does is in the module that its
build calls.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from bundle.atomic import write_atomically
from bundle.hashing import hash_json
from bundle.token_ids import read_eos_token_ids
from export.checks import fitting_tasks
from export.graph.parity import measure_in_fresh_process
from export.publish.gates import PARITY_NAME, graph_size_bytes
from export.record import find_template_date
from export.run.files import read_json, write_json
from export.run.processes import World
from export.run.settings import ExportConfig
from export.run.stages import Stage, StageRunner, StageSpec, fresh
from export.run.variants import FLOAT_VARIANT, HalfVariant, WeightOnlyVariant
from export.student.grid import BlockGrid
from export.student.grid_training import load_grid_weights, save_grid_weights
from export.student.logits_cache import LogitsCache, write_logits_cache
from export.student.phases import Distillation, GridTraining, Text, linear_grids
from export.student.pretrained import compression_warning, load_student
from export.student.prune import Removal, drop_layers, rank_channels, rank_layers, shrink_mlp
from export.student.trainer import StepRecord, Trainer, Watch
from export.teacher.accept import accept, read_accepted, write_accepted
from export.teacher.examples import Example
from export.teacher.grading import math_verify_version
from export.teacher.model_files import (
    copy_tokenizer,
    load_model,
    training_device,
    write_variant_files,
)
from export.teacher.sample import ROWS_NAME, read_completions, sample_teacher
from export.teacher.source import TeacherFolder, resolve_teacher
from export.teacher.task_sources import Loaded, scorer_version
from export.teacher.tasks import Task
from serve.text.real_tokens import RealTokens
from serve.text.tokenizer import Tokenizer
from serve.text.tokenizer_files import tells_date

TRAINING_NAME = "training.jsonl"
PROBES_NAME = "probes.json"
REMOVALS_NAME = "removals.json"
GRID_NAME = "grid.safetensors"
CHECKPOINTS = "checkpoints"


class Reporter(Protocol):
    """Where an export tells people how far it is."""

    def say(self, message: str) -> None: ...

    def track(self, label: str) -> Callable[[int, int], None]:
        """Return a function to be called with (done, total)."""
        ...


def run_export(config: ExportConfig, reporter: Reporter, world: World | None = None) -> Path:
    """Run every stage that is not finished yet; returns the bundle's path.

    GateError when no variant passes its gates; ExportError and TeacherError name what to fix.
    """
    return open_pipeline(config, reporter, world).package()


def open_pipeline(
    config: ExportConfig,
    reporter: Reporter,
    world: World | None = None,
    models: Sequence[TeacherFolder | None] = (),
) -> Pipeline:
    """Find (or fetch) the teacher, and a pretrained student, and describe the stages.

    `models` are those of them that were found before.
    """
    world = world or World()
    if not world.is_main:
        world.wait()
    teacher, student, *_ = (*models, None, None)
    if teacher is None:
        teacher = resolve_teacher(config.teacher, config.cache_dir, reporter.say)
    pipeline = Pipeline(config, teacher, reporter, world, student)
    _ = pipeline.student  # a wrong one is told before any work
    if world.is_main:
        world.wait()
    return pipeline


class Pipeline:
    """The stages of one recipe: each property describes one, each `_build` method makes it."""

    def __init__(
        self,
        config: ExportConfig,
        teacher: TeacherFolder,
        reporter: Reporter,
        world: World | None = None,
        student: TeacherFolder | None = None,
    ) -> None:
        self.config = config
        self._student = student
        self.teacher = teacher
        self.reporter = reporter
        self.world = world or World()
        self.stages = StageRunner(config.output_dir / "work", reporter.say, self.world)

    # -- what there is ----------------------------------------------------------------------

    @property
    def specs(self) -> list[StageSpec]:
        """All stages in the order in which they run."""
        cached = [self.cached] if self.config.cache.kind != "none" else []
        variants = [
            spec
            for name in self.config.variants
            for spec in (
                *([self.trained(name)] if name in self.trained_variants else []),
                self.quantized(name),
            )
        ]
        return [
            self.sampled, self.accepted, *cached, self.pruned, self.distilled, self.exported,
            *variants, self.evaluated,
        ]  # fmt: skip

    @property
    def trained_variants(self) -> list[str]:
        """The variants for which the student is trained on the grid."""
        return [
            name
            for name, config in self.config.variants.items()
            if isinstance(config, WeightOnlyVariant) and config.train
        ]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's, with the date that prompts of this run tell."""
        return Tokenizer.load(self.teacher.path, find_template_date(self.config.output_dir))

    @cached_property
    def loaded(self) -> Loaded:
        """The tasks, and what was left out of their sources."""
        return fitting_tasks(self.config, self.teacher, lambda: self.tokenizer)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.loaded.tasks

    @cached_property
    def sampled(self) -> StageSpec:
        settings = {
            "teacher": self.teacher.reference.weights_sha256,
            "teacher_files": dict(self.teacher.files),
            "sample": self.config.sample.model_dump(),
            "tasks": hash_json([asdict(task) for task in self.tasks]),
        }
        if tells_date(self.teacher.path):
            settings["template_date"] = find_template_date(self.config.output_dir).isoformat()
        return StageSpec("sample", settings, (), self._build_sample, version=2, can_resume=True)

    @cached_property
    def accepted(self) -> StageSpec:
        settings = self.config.accept.model_dump()
        if version := scorer_version(self.config.tasks):
            settings["reasoning_gym"] = version
        return StageSpec("accept", settings, (self.sampled,), self._build_accept)

    @cached_property
    def cached(self) -> StageSpec:
        settings = self.config.cache.model_dump()
        return StageSpec("cache", settings, (self.accepted,), self._build_cache, can_resume=True)

    @cached_property
    def pruned(self) -> StageSpec:
        if self.config.student is None:
            settings: dict[str, Any] = self.config.prune.model_dump()
            return StageSpec("prune", settings, (self.accepted,), self._build_prune, version=2)
        student = self.student
        assert student is not None
        settings = {"sha256": student.reference.weights_sha256, "files": dict(student.files)}
        return StageSpec("student", settings, (self.accepted,), self._build_pretrained)

    @cached_property
    def distilled(self) -> StageSpec:
        reads_cache = any(p.teacher_logits == "cache" for p in self.config.distill.phases)
        after = (self.accepted, self.pruned, *([self.cached] if reads_cache else []))
        settings = self.config.distill.model_dump(exclude={"checkpoint_every_s"})
        if any(phase.data == "student" for phase in self.config.distill.phases):
            settings["sample"] = self.config.sample.model_dump()
        return StageSpec(
            "distill", settings, after, self._build_distill,
            version=2, can_resume=True, is_distributed=True, scratch=(CHECKPOINTS,),
        )  # fmt: skip

    @cached_property
    def exported(self) -> StageSpec:
        settings = self.config.onnx.model_dump()
        return StageSpec(f"onnx-{FLOAT_VARIANT}", settings, (self.distilled,), self._build_onnx)

    def trained(self, name: str) -> StageSpec:
        """Return the stage that trains the student on a variant's grid."""
        config = self.config.variants[name]
        assert isinstance(config, WeightOnlyVariant) and config.train, name
        return StageSpec(
            f"grid-{name}", config.model_dump(exclude={"accuracy_level"}),
            (self.accepted, self.exported), lambda folder: self._build_trained(name, folder),
            can_resume=True, is_distributed=True, scratch=(CHECKPOINTS,),
        )  # fmt: skip

    def quantized(self, name: str) -> StageSpec:
        """Return the stage that writes a variant's graph."""
        config = self.config.variants[name]
        before = self.trained(name) if name in self.trained_variants else self.accepted
        return StageSpec(
            f"onnx-{name}", config.model_dump(), (self.exported, before),
            lambda folder: self._build_variant(name, folder), version=2,
        )  # fmt: skip

    @property
    def graphs(self) -> dict[str, StageSpec]:
        """The stage of every variant's graph, the float one first."""
        others = {name: self.quantized(name) for name in self.config.variants}
        return {FLOAT_VARIANT: self.exported, **others}

    @cached_property
    def evaluated(self) -> StageSpec:
        settings = self.config.evaluate.model_dump() | {"math_verify": math_verify_version()}
        after = (self.accepted, *self.graphs.values())
        return StageSpec("evaluate", settings, after, self._build_evaluation, version=3)

    # -- running ----------------------------------------------------------------------------

    def run(self, spec: StageSpec) -> Stage:
        """Return a stage, building it and what comes before it where that is missing."""
        return self.stages.run(spec)

    def package(self) -> Path:
        """Run what is missing and return the bundle's path; see `export.publish.bundle`."""
        from export.publish.packaging import package

        for spec in self.specs:
            if self.stages.find(spec):
                self.reporter.say(f"{spec.name}: finished before, in {self.path(spec)}")
            self.run(spec)
        target = package(self) if self.world.is_main else self.config.output_dir / "bundle"
        self.world.wait()
        return target

    def path(self, spec: StageSpec) -> Path:
        return self.stages.path(spec)

    def examples(self, split: str) -> list[Example]:
        """Return the accepted ("train") or held-out ("test") completions."""
        rows = read_accepted(self.path(self.accepted)).completions
        return [row.example for row in rows if row.split == split]

    @cached_property
    def real_tokens(self) -> RealTokens:
        """Those of teacher and student, which share a tokenizer."""
        return Tokenizer.load(self.teacher.path).real_tokens

    @property
    def text(self) -> Text:
        eos_token_ids = read_eos_token_ids(self.teacher.path)
        return Text(self.examples("train"), self.examples("test"), eos_token_ids)

    @property
    def removed_layers(self) -> list[int]:
        """The teacher's layers that the student lacks, in the order in which they went."""
        return [removal.layer for removal in self.removals]

    def kept_layers(self, num_teacher_layers: int) -> list[int] | None:
        """The teacher's layers that the student has; None when it was not cut out of it."""
        if self.config.student is not None:
            return None
        return _kept_layers(self.removed_layers, num_teacher_layers)

    @property
    def removals(self) -> list[Removal]:
        path = self.path(self.pruned) / REMOVALS_NAME
        return [Removal(**raw) for raw in read_json(path)] if path.exists() else []

    # -- builds -----------------------------------------------------------------------------

    def _build_sample(self, folder: Path) -> dict[str, Any]:
        rows = sample_teacher(
            self.teacher.path, self.tasks, self.config.sample, folder,
            self.reporter.track("teacher answers"), tokenizer=self.tokenizer,
        )  # fmt: skip
        return {
            "completions": len(rows),
            "completion_tokens": sum(len(row.token_ids) for row in rows),
            "cut_at_max_tokens": sum(row.finish_reason == "length" for row in rows),
        }

    def _build_accept(self, folder: Path) -> dict[str, Any]:
        rows = read_completions(self.path(self.sampled) / ROWS_NAME)
        accepted = accept(self.tasks, rows, self.config.accept, self.tokenizer)
        write_accepted(folder, accepted)
        return {
            "accepted": accepted.summary.num_accepted,
            "sampled": accepted.summary.num_sampled,
            "held_out": accepted.summary.num_held_out,
        }

    def _build_cache(self, folder: Path) -> dict[str, Any]:
        cache = write_logits_cache(
            folder,
            load_model(self.teacher.path, torch.bfloat16, training_device()),
            self.examples("train"),
            self.config.cache,
            teacher_sha256=self.teacher.reference.weights_sha256,
            real_tokens=self.real_tokens,
            progress=self.reporter.track("examples cached"),
        )
        return {"size_bytes": cache.size_bytes}

    def _build_prune(self, folder: Path) -> dict[str, Any]:
        config = self.config.prune
        candidates = self.examples("train")
        texts = random.Random(0).sample(candidates, min(config.num_texts, len(candidates)))
        teacher = load_model(self.teacher.path, torch.bfloat16, training_device())
        removals = rank_layers(
            teacher,
            texts,
            config.num_removed_layers,
            first_candidate=config.first_candidate,
            num_candidates=config.num_candidates,
            real_tokens=self.real_tokens,
            progress=self.reporter.track("layers tried"),
        )
        write_json(folder / REMOVALS_NAME, [asdict(removal) for removal in removals])
        student = self._cut(load_model(self.teacher.path, torch.float32), removals, texts)
        return self._save_student(student, folder) | {
            "removed_layers": [removal.layer for removal in removals],
            "kl_before_training": removals[-1].kl if removals else 0.0,
        }

    def _cut(self, teacher: Any, removals: Sequence[Removal], texts: Sequence[Example]) -> Any:
        kept = _kept_layers([r.layer for r in removals], teacher.config.num_hidden_layers)
        student = drop_layers(teacher, kept)
        if self.config.prune.kept_mlp_share == 1.0:
            return student
        return shrink_mlp(student, rank_channels(student, texts), self.config.prune.kept_mlp_share)

    def _build_pretrained(self, folder: Path) -> dict[str, Any]:
        assert self.student is not None
        return self._save_student(load_student(self.student.path, self.teacher.path), folder)

    def _save_student(self, student: Any, folder: Path) -> dict[str, Any]:
        student.save_pretrained(folder)
        copy_tokenizer(self.teacher.path, folder)
        num_parameters = student.num_parameters()
        warning = compression_warning(self.teacher.reference.num_parameters, num_parameters)
        if warning:
            self.reporter.say(f"warning: {warning}")
        return {"layers": student.config.num_hidden_layers, "parameters": num_parameters}

    @cached_property
    def student(self) -> TeacherFolder | None:
        """The pretrained student, fetched where it is not here yet; None where one is pruned."""
        if self.config.student is None or self._student is not None:
            return self._student
        return resolve_teacher(self.config.student, self.config.cache_dir, self.reporter.say)

    def _build_distill(self, folder: Path) -> dict[str, Any]:
        config = self.config
        teacher = load_model(self.teacher.path, torch.bfloat16, training_device())
        distillation = Distillation(
            load_model(self.path(self.pruned), torch.float32, training_device()),
            teacher,
            self.text,
            folder,
            config=config.distill,
            sample=config.sample,
            kept_layers=self.kept_layers(teacher.config.num_hidden_layers),
            cache=self._open_cache(),
            real_tokens=self.real_tokens,
            world=self.world,
        )
        trainer = self._trainer(folder, distillation.probe)
        log = trainer.run(distillation.phases())
        distillation.measure(len(config.distill.phases))
        if not self.world.is_main:
            return {}
        distillation.student.save_pretrained(folder)
        copy_tokenizer(self.teacher.path, folder)
        log.write_steps(folder / TRAINING_NAME)
        write_json(folder / PROBES_NAME, [asdict(probe) for probe in log.probes])
        return {
            "layers": distillation.student.config.num_hidden_layers,
            "parameters": distillation.student.num_parameters(),
            "steps": len(log.steps),
            "held_out_kl": distillation.held_out.forward_kl[-1],
        }

    def _open_cache(self) -> LogitsCache | None:
        if self.cached not in self.distilled.after:
            return None
        sha256 = self.teacher.reference.weights_sha256
        return LogitsCache.open(self.path(self.cached), self.examples("train"), sha256)

    def _trainer(self, folder: Path, probe: Callable[[], float] | None = None) -> Trainer:
        show = self.reporter.track("training, per mille")

        def on_step(record: StepRecord, progress: float) -> None:
            show(round(1000 * progress), 1000)

        return Trainer(
            folder / CHECKPOINTS,
            checkpoint_every_s=self.config.distill.checkpoint_every_s,
            world=self.world,
            watch=Watch(on_step, probe, self.reporter.say),
        )

    def _build_onnx(self, folder: Path) -> dict[str, Any]:
        max_model_len = self._export_graph(self.path(self.distilled), folder)
        write_variant_files(self.path(self.distilled), folder, max_model_len)
        parity = measure_in_fresh_process(self.path(self.distilled), folder)
        write_json(folder / PARITY_NAME, asdict(parity))
        return {"onnx_kl": parity.max_mean_kl, "logit_difference": parity.max_logit_difference}

    def _export_graph(self, student_dir: Path, folder: Path) -> int:
        """Write the float graph of a student; returns how many positions it covers."""
        from export.graph.trace import export_onnx

        student = load_model(student_dir, torch.float32)
        positions: int = student.config.max_position_embeddings
        max_model_len = min(self.config.onnx.max_model_len, positions)
        export_onnx(student, folder, max_model_len=max_model_len)
        return max_model_len

    def _build_trained(self, name: str, folder: Path) -> dict[str, Any]:
        from export.graph.quantize import gptq_weights, split_by_module

        config = self.config.variants[name]
        assert isinstance(config, WeightOnlyVariant) and config.train
        source, text = self.path(self.distilled), self.text
        student = load_model(source, torch.float32, training_device())

        def grid_of(linear: str) -> BlockGrid:
            grid = config.grid_of(linear)
            return BlockGrid(grid.bits, grid.block_size)

        grids = linear_grids(student, grid_of)
        initial_path = folder / CHECKPOINTS / f"initial-{GRID_NAME}"
        if self.world.is_main and config.method == "gptq" and not initial_path.exists():
            self.reporter.say("gptq, to start from")
            initial_path.parent.mkdir(exist_ok=True)
            weights = gptq_weights(self.path(self.exported), config, text.train)
            sizes = {n: student.get_submodule(n).out_features for n in grids}
            with write_atomically(initial_path) as partial:
                save_grid_weights(partial, split_by_module(weights, sizes.__getitem__))
        self.world.wait()
        initial = load_grid_weights(initial_path) if config.method == "gptq" else {}
        training = GridTraining(
            student, load_model(source, torch.bfloat16, training_device()),
            grids, initial, config.train, text, self.real_tokens,
        )  # fmt: skip
        trainer = self._trainer(folder)
        log = trainer.run([training.phase])
        held_out_kl = training.measure()
        if not self.world.is_main:
            return {}
        save_grid_weights(folder / GRID_NAME, training.parameters.grid_weights())
        training.student.save_pretrained(folder)
        copy_tokenizer(source, folder)
        log.write_steps(folder / TRAINING_NAME)
        return {"steps": len(log.steps), "held_out_kl_to_student": held_out_kl}

    def _build_variant(self, name: str, folder: Path) -> dict[str, Any]:
        from export.graph.quantize import quantize_trained, quantize_variant

        config, source = self.config.variants[name], self.path(self.exported)
        if isinstance(config, WeightOnlyVariant) and config.train:
            trained = self.path(self.trained(name))
            graph = fresh(folder / "float")
            self._export_graph(trained, graph)
            weights = load_grid_weights(trained / GRID_NAME)
            quantize_trained(graph, folder, config, weights)
            shutil.rmtree(graph)
        else:
            quantize_variant(source, folder, config, self.examples("train"))
        max_model_len = read_json(source / "config.json")["max_position_embeddings"]
        write_variant_files(self.path(self.distilled), folder, max_model_len)
        return {"size_bytes": graph_size_bytes(folder)}

    def _build_evaluation(self, folder: Path) -> dict[str, Any]:
        from export.measure.stage import run_evaluation

        return run_evaluation(self, folder)

    @property
    def measured_graphs(self) -> dict[str, Path]:
        """The folders of the variants that can be run on a CPU, where `evaluate` runs them."""
        return {
            name: self.path(spec)
            for name, spec in self.graphs.items()
            if not _needs_gpu(self.config.variants.get(name))
        }


def _needs_gpu(config: Any) -> bool:
    return isinstance(config, HalfVariant) and config.method == "bfloat16"


def _kept_layers(removed: Sequence[int], num_teacher_layers: int) -> list[int]:
    return [layer for layer in range(num_teacher_layers) if layer not in removed]
