"""What each stage does: it fills its folder from those of the stages before it.

A build returns a summary for people, and leaves what the next stages read (`Artifacts`). The work
itself is in the modules that it calls.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bundle.atomic import write_atomically
from bundle.token_ids import read_eos_token_ids
from export.graph.parity import PARITY_NAME, measure_in_fresh_process
from export.inputs import RunInputs
from export.run.artifacts import Artifacts
from export.run.files import read_json, write_json
from export.run.processes import World
from export.run.stages import RunReporter, fresh
from export.run.variants import FLOAT_VARIANT, WeightOnlyVariant
from export.student.checkpoint import CHECKPOINTS
from export.student.grid import BlockGrid
from export.student.grid_training import GRID_NAME, load_grid_weights, save_grid_weights
from export.student.logits_cache import LogitsCache, write_logits_cache
from export.student.phases import Distillation, GridTraining, Text, linear_grids
from export.student.pretrained import compression_warning, load_student
from export.student.prune import (
    Removal,
    drop_layers,
    kept_layers,
    rank_channels,
    rank_layers,
    read_removals,
    shrink_mlp,
    write_removals,
)
from export.student.trainer import StepRecord, Trainer, Watch
from export.teacher.accept import accept, read_examples, write_accepted
from export.teacher.examples import Example
from export.teacher.model_files import (
    copy_tokenizer,
    load_model,
    training_device,
    write_variant_files,
)
from export.teacher.sample import ROWS_NAME, read_completions, sample_teacher


@dataclass(frozen=True, slots=True)
class StageBuilds:
    """The builds of one run; those of training are called by every process of `world`."""

    inputs: RunInputs
    artifacts: Artifacts
    reporter: RunReporter
    world: World

    def sample(self, folder: Path) -> dict[str, Any]:
        inputs, track = self.inputs, self.reporter.track("teacher answers")
        rows = sample_teacher(
            inputs.teacher.path, inputs.loaded.tasks, inputs.config.sample, folder, track,
            tokenizer=inputs.tokenizer,
        )  # fmt: skip
        return {
            "completions": len(rows),
            "completion_tokens": sum(len(row.token_ids) for row in rows),
            "cut_at_max_tokens": sum(row.finish_reason == "length" for row in rows),
        }

    def accept(self, folder: Path) -> dict[str, Any]:
        inputs = self.inputs
        rows = read_completions(self.artifacts.sampled / ROWS_NAME)
        accepted = accept(inputs.loaded.tasks, rows, inputs.config.accept, inputs.tokenizer)
        write_accepted(folder, accepted)
        return {
            "accepted": accepted.summary.num_accepted,
            "sampled": accepted.summary.num_sampled,
            "held_out": accepted.summary.num_held_out,
        }

    def cache(self, folder: Path) -> dict[str, Any]:
        cache = write_logits_cache(
            folder,
            self._load_teacher(),
            self._examples("train"),
            self.inputs.config.cache,
            teacher_sha256=self.inputs.teacher.reference.weights_sha256,
            real_tokens=self.inputs.real_tokens,
            progress=self.reporter.track("examples cached"),
        )
        return {"size_bytes": cache.size_bytes}

    def prune(self, folder: Path) -> dict[str, Any]:
        config = self.inputs.config.prune
        candidates = self._examples("train")
        texts = random.Random(0).sample(candidates, min(config.num_texts, len(candidates)))
        removals = rank_layers(
            self._load_teacher(),
            texts,
            config.num_removed_layers,
            first_candidate=config.first_candidate,
            num_candidates=config.num_candidates,
            real_tokens=self.inputs.real_tokens,
            progress=self.reporter.track("layers tried"),
        )
        write_removals(folder, removals)
        teacher = load_model(self.inputs.teacher.path, torch.float32)
        return self._save_student(self._cut(teacher, removals, texts), folder) | {
            "removed_layers": [removal.layer for removal in removals],
            "kl_before_training": removals[-1].kl if removals else 0.0,
        }

    def pretrained(self, folder: Path) -> dict[str, Any]:
        assert self.inputs.student is not None, "refused by `Pipeline`"
        student = load_student(self.inputs.student.path, self.inputs.teacher.path)
        return self._save_student(student, folder)

    def distill(self, folder: Path) -> dict[str, Any]:
        distillation = self._distillation(folder)
        log = self._trainer(folder, distillation.probe).run(distillation.phases())
        distillation.measure(len(self.inputs.config.distill.phases))
        if not self.world.is_main:
            return {}
        distillation.student.save_pretrained(folder)
        copy_tokenizer(self.inputs.teacher.path, folder)
        log.write_steps(folder)
        log.write_probes(folder)
        return {
            "layers": distillation.student.config.num_hidden_layers,
            "parameters": distillation.student.num_parameters(),
            "steps": len(log.steps),
            "held_out_kl": distillation.held_out.forward_kl[-1],
        }

    def float_graph(self, folder: Path) -> dict[str, Any]:
        student_dir = self.artifacts.student
        max_model_len = self._export_graph(student_dir, folder)
        write_variant_files(student_dir, folder, max_model_len)
        parity = measure_in_fresh_process(student_dir, folder)
        write_json(folder / PARITY_NAME, asdict(parity))
        return {"onnx_kl": parity.max_mean_kl, "logit_difference": parity.max_logit_difference}

    def grid(self, variant: str, folder: Path) -> dict[str, Any]:
        config = self._trained_config(variant)
        assert config.train is not None, variant
        source, text = self.artifacts.student, self._text()
        student = load_model(source, torch.float32, training_device())

        def grid_of(linear: str) -> BlockGrid:
            grid = config.grid_of(linear)
            return BlockGrid(grid.bits, grid.block_size)

        grids = linear_grids(student, grid_of)
        initial_path = folder / CHECKPOINTS / f"initial-{GRID_NAME}"
        if self.world.is_main and config.method == "gptq" and not initial_path.exists():
            sizes = {name: student.get_submodule(name).out_features for name in grids}
            self._write_initial(initial_path, config, text.train, sizes)
        self.world.wait()
        initial = load_grid_weights(initial_path) if config.method == "gptq" else {}
        training = GridTraining(
            student, load_model(source, torch.bfloat16, training_device()),
            grids, initial, config.train, text, self.inputs.real_tokens,
        )  # fmt: skip
        log = self._trainer(folder).run([training.phase])
        held_out_kl = training.measure()
        if not self.world.is_main:
            return {}
        save_grid_weights(folder / GRID_NAME, training.parameters.grid_weights())
        training.student.save_pretrained(folder)
        copy_tokenizer(source, folder)
        log.write_steps(folder)
        return {"steps": len(log.steps), "held_out_kl_to_student": held_out_kl}

    def variant(self, name: str, folder: Path) -> dict[str, Any]:
        from export.graph.quantize import quantize_trained, quantize_variant
        from export.graph.surgery import graph_size_bytes

        config, source = self.inputs.config.variants[name], self.artifacts.graphs[FLOAT_VARIANT]
        if isinstance(config, WeightOnlyVariant) and config.train:
            trained = self.artifacts.trained[name]
            graph = fresh(folder / "float")
            self._export_graph(trained, graph)
            quantize_trained(graph, folder, config, load_grid_weights(trained / GRID_NAME))
            shutil.rmtree(graph)
        else:
            quantize_variant(source, folder, config, self._examples("train"))
        max_model_len = read_json(source / "config.json")["max_position_embeddings"]
        write_variant_files(self.artifacts.student, folder, max_model_len)
        return {"size_bytes": graph_size_bytes(folder)}

    def evaluation(self, folder: Path) -> dict[str, Any]:
        from export.measure.stage import EvaluationStage

        stage = EvaluationStage(
            self.inputs.config, self.inputs.teacher.path, self.artifacts,
            self.inputs.tokenizer, self.inputs.loaded.tasks, self.reporter,
        )  # fmt: skip
        return stage.run(folder)

    # -- parts ------------------------------------------------------------------------------

    def _examples(self, split: str) -> list[Example]:
        return read_examples(self.artifacts.accepted, split)

    def _text(self) -> Text:
        eos_token_ids = read_eos_token_ids(self.inputs.teacher.path)
        return Text(self._examples("train"), self._examples("test"), eos_token_ids)

    def _load_teacher(self) -> Any:
        return load_model(self.inputs.teacher.path, torch.bfloat16, training_device())

    def _cut(self, teacher: Any, removals: Sequence[Removal], texts: Sequence[Example]) -> Any:
        share = self.inputs.config.prune.kept_mlp_share
        student = drop_layers(teacher, kept_layers(removals, teacher.config.num_hidden_layers))
        if share == 1.0:
            return student
        return shrink_mlp(student, rank_channels(student, texts), share)

    def _save_student(self, student: Any, folder: Path) -> dict[str, Any]:
        teacher = self.inputs.teacher
        student.save_pretrained(folder)
        copy_tokenizer(teacher.path, folder)
        num_parameters = student.num_parameters()
        if warning := compression_warning(teacher.reference.num_parameters, num_parameters):
            self.reporter.say(f"warning: {warning}")
        return {"layers": student.config.num_hidden_layers, "parameters": num_parameters}

    def _distillation(self, folder: Path) -> Distillation:
        config, teacher = self.inputs.config, self._load_teacher()
        kept = None  # the student was not cut out of the teacher
        if config.student is None:
            removals = read_removals(self.artifacts.untrained)
            kept = kept_layers(removals, teacher.config.num_hidden_layers)
        return Distillation(
            load_model(self.artifacts.untrained, torch.float32, training_device()),
            teacher,
            self._text(),
            folder,
            config=config.distill,
            sample=config.sample,
            kept_layers=kept,
            cache=self._open_cache(),
            real_tokens=self.inputs.real_tokens,
            world=self.world,
        )

    def _open_cache(self) -> LogitsCache | None:
        if not self.inputs.config.reads_cache:
            return None
        assert self.artifacts.cached is not None, "refused by the recipe's schema"
        sha256 = self.inputs.teacher.reference.weights_sha256
        return LogitsCache.open(self.artifacts.cached, self._examples("train"), sha256)

    def _trainer(self, folder: Path, probe: Callable[[], float] | None = None) -> Trainer:
        show = self.reporter.track("training, per mille")

        def on_step(record: StepRecord, progress: float) -> None:
            show(round(1000 * progress), 1000)

        return Trainer(
            folder / CHECKPOINTS,
            checkpoint_every_s=self.inputs.config.distill.checkpoint_every_s,
            world=self.world,
            watch=Watch(on_step, probe, self.reporter.say),
        )

    def _export_graph(self, student_dir: Path, folder: Path) -> int:
        """Write the float graph of a student; returns how many positions it covers."""
        from export.graph.trace import export_onnx

        student = load_model(student_dir, torch.float32)
        positions: int = student.config.max_position_embeddings
        max_model_len = min(self.inputs.config.onnx.max_model_len, positions)
        export_onnx(student, folder, max_model_len=max_model_len)
        return max_model_len

    def _trained_config(self, variant: str) -> WeightOnlyVariant:
        config = self.inputs.config.variants[variant]
        assert isinstance(config, WeightOnlyVariant), variant
        return config

    def _write_initial(
        self,
        path: Path,
        config: WeightOnlyVariant,
        texts: Sequence[Example],
        sizes: dict[str, int],
    ) -> None:
        """Write GPTQ's weights for the training to start from."""
        from export.graph.quantize import gptq_weights, split_by_module

        self.reporter.say("gptq, to start from")
        path.parent.mkdir(exist_ok=True)
        weights = gptq_weights(self.artifacts.graphs[FLOAT_VARIANT], config, texts)
        with write_atomically(path) as partial:
            save_grid_weights(partial, split_by_module(weights, sizes.__getitem__))
