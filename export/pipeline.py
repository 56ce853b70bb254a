"""The stages of an export, one after the other: from a teacher's name to a verified bundle."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from bundle.hashing import hash_json
from bundle.manifest import StudentInfo
from bundle.verify import verify_bundle
from export.config import FLOAT_VARIANT, ExportConfig
from export.distill import Example, Pair, StepRecord, TrainingPlan, train
from export.evaluate import evaluate
from export.losses import DistillationLoss
from export.package import TOKENIZER_FILES, is_packaged, write_bundle, write_variant_files
from export.parity import measure_in_fresh_process
from export.prune import drop_layers, rank_layers
from export.report import (
    STUDENT,
    TEACHER,
    TORCH,
    TRANSFORMERS,
    choose_default,
    describe_evaluation,
    describe_variant,
    graph_size_bytes,
    summarize,
)
from export.sample import ROWS_NAME, read_completions, sample_teacher
from export.speed import PROMPT_TOKENS, race, tandem_contender, transformers_contender
from export.stages import Stage, StageRunner, fresh
from export.tasks import Task, builtin_tasks
from export.teacher import TeacherFolder, count_parameters, resolve_teacher


class Reporter(Protocol):
    """Where an export tells people how far it is."""

    def say(self, message: str) -> None: ...

    def track(self, label: str) -> Callable[[int, int], None]:
        """Return a function to be called with (done, total)."""
        ...


def run_export(config: ExportConfig, reporter: Reporter) -> Path:
    """Run every stage that is not finished yet; returns the bundle's path.

    GateError when no variant passes its gates; ExportError and TeacherError name what to mend.
    """
    teacher = resolve_teacher(config.teacher, config.cache_dir, reporter.say)
    stages = StageRunner(config.output_dir / "work", reporter.say)
    return _Run(config, teacher, stages, reporter).bundle()


class _Run:
    """One export: each method is a stage, and asks for the stages it needs."""

    def __init__(
        self, config: ExportConfig, teacher: TeacherFolder, stages: StageRunner, reporter: Reporter
    ) -> None:
        self._config = config
        self._teacher = teacher
        self._stages = stages
        self._reporter = reporter

    def bundle(self) -> Path:
        sampled = self._sampled()
        pruned = self._pruned(sampled)
        distilled = self._distilled(sampled, pruned)
        graphs = {FLOAT_VARIANT: self._exported(distilled)}
        for name in self._config.variants:
            graphs[name] = self._quantized(name, distilled, graphs[FLOAT_VARIANT])
        evaluated = self._evaluated(sampled, distilled, graphs)
        lineage = (sampled, pruned, distilled, *graphs.values(), evaluated)
        return self._packaged(pruned, distilled, graphs, evaluated, lineage)

    # -- stages -----------------------------------------------------------------------------

    def _sampled(self) -> Stage:
        tasks = select_tasks(self._config)
        settings = {
            "teacher": self._teacher.reference.weights_sha256,
            "sample": self._config.sample.model_dump(),
            "tasks": hash_json([asdict(task) for task in tasks]),
        }

        def build(folder: Path) -> dict[str, Any]:
            rows = sample_teacher(
                self._teacher.path, tasks, self._config.sample, folder,
                self._reporter.track("teacher answers"),
            )  # fmt: skip
            return {
                "completions": len(rows),
                "completion_tokens": sum(len(row.token_ids) for row in rows),
                "cut_at_max_tokens": sum(row.finish_reason == "length" for row in rows),
            }

        return self._stages.run("sample", settings, (), build)

    def _pruned(self, sampled: Stage) -> Stage:
        config = self._config.prune

        def build(folder: Path) -> dict[str, Any]:
            texts = random.Random(0).sample(_examples(sampled, "train"), config.num_texts)
            removals = rank_layers(
                _load_model(self._teacher.path, torch.bfloat16),
                texts,
                config.num_removed_layers,
                first_candidate=config.first_candidate,
                num_candidates=config.num_candidates,
                progress=self._reporter.track("layers tried"),
            )
            ranking = [asdict(removal) for removal in removals]
            (folder / "removals.json").write_text(json.dumps(ranking, indent=2) + "\n")
            return {
                "removed_layers": [removal.layer for removal in removals],
                "kl_before_training": removals[-1].kl if removals else 0.0,
            }

        return self._stages.run("prune", config.model_dump(), (sampled,), build)

    def _distilled(self, sampled: Stage, pruned: Stage) -> Stage:
        config = self._config.distill

        def build(folder: Path) -> dict[str, Any]:
            fresh(folder)
            teacher = _load_model(self._teacher.path, torch.float32)
            removed = _removed_layers(pruned)
            kept = _kept_layers(removed, teacher.config.num_hidden_layers)
            student = drop_layers(teacher, kept)
            num_shared = min(removed, default=0) if config.freeze_shared_layers else 0
            pair = Pair(student, teacher.to(torch.bfloat16), num_shared)
            records = self._train(pair, _examples(sampled, "train"))
            student.save_pretrained(folder)
            _copy_tokenizer(self._teacher.path, folder)
            lines = "".join(json.dumps(asdict(r)) + "\n" for r in records)
            (folder / "training.jsonl").write_text(lines)
            tail = records[-max(len(records) // 10, 1) :]
            return {
                "layers": len(kept),
                "parameters": student.num_parameters(),
                "steps": len(records),
                "final_soft_kl": sum(r.soft for r in tail) / len(tail),
            }

        return self._stages.run("distill", config.model_dump(), (sampled, pruned), build)

    def _train(self, pair: Pair, examples: Sequence[Example]) -> list[StepRecord]:
        config = self._config.distill
        plan = TrainingPlan(
            num_epochs=config.num_epochs,
            learning_rate=config.learning_rate,
            warmup_share=config.warmup_share,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            tokens_per_step=config.tokens_per_step,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            loss=DistillationLoss(config.alpha, config.temperature),
            seed=config.seed,
        )
        show = self._reporter.track("training steps")
        return train(pair, examples, plan, lambda record, total: show(record.step + 1, total))

    def _exported(self, distilled: Stage) -> Stage:
        config = self._config.onnx

        def build(folder: Path) -> dict[str, Any]:
            from export.onnx_graph import export_onnx

            fresh(folder)
            student = _load_model(distilled.path, torch.float32)
            max_model_len = min(config.max_model_len, student.config.max_position_embeddings)
            export_onnx(student, folder, max_model_len=max_model_len)
            write_variant_files(distilled.path, folder, max_model_len)
            parity = measure_in_fresh_process(distilled.path, folder)
            (folder / "parity.json").write_text(json.dumps(asdict(parity)) + "\n")
            return {"onnx_kl": parity.max_mean_kl, "logit_difference": parity.max_logit_difference}

        return self._stages.run(f"onnx-{FLOAT_VARIANT}", config.model_dump(), (distilled,), build)

    def _quantized(self, name: str, distilled: Stage, exported: Stage) -> Stage:
        config = self._config.variants[name]

        def build(folder: Path) -> dict[str, Any]:
            from export.onnx_graph import load_untied, save_onnx
            from export.quantize import WeightOnly, quantize_weights

            fresh(folder)
            recipe = WeightOnly(config.bits, config.block_size, config.accuracy_level)
            save_onnx(quantize_weights(load_untied(exported.path), recipe), folder)
            max_model_len = _read_json(exported.path / "config.json")["max_position_embeddings"]
            write_variant_files(distilled.path, folder, max_model_len)
            return {"size_bytes": graph_size_bytes(folder)}

        return self._stages.run(f"onnx-{name}", config.model_dump(), (exported,), build)

    def _evaluated(self, sampled: Stage, distilled: Stage, graphs: dict[str, Stage]) -> Stage:
        config = self._config.evaluate
        held_out = _examples(sampled, "test")

        def build(folder: Path) -> dict[str, Any]:
            from serve.onnx_backend import OnnxBackend
            from serve.torch_backend import TorchBackend

            fresh(folder)
            longest = PROMPT_TOKENS + config.num_timed_tokens + 1
            max_model_len = max(longest, *map(len, held_out))
            size: dict[str, Any] = {
                "device": "cpu",
                "max_num_seqs": config.max_num_seqs,
                "max_model_len": max_model_len,
            }
            backends: dict[str, Any] = {
                name: OnnxBackend.load(stage.path, **size) for name, stage in graphs.items()
            }
            backends[STUDENT] = TorchBackend.load(distilled.path, dtype=torch.float32, **size)
            backends[TEACHER] = TorchBackend.load(self._teacher.path, dtype=torch.float32, **size)
            quality = evaluate(
                backends, (TEACHER, STUDENT), held_out, self._reporter.track("held-out prompts")
            )
            del backends[STUDENT]
            backends[TEACHER] = TorchBackend.load(self._teacher.path, dtype=torch.bfloat16, **size)
            summary = summarize(quality, self._race(backends), len(held_out))
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            student = quality[TEACHER, STUDENT]
            return {
                "student_kl": student.forward_kl,
                "argmax_agreement": student.argmax_agreement,
                "tokens": student.num_tokens,
            }

        return self._stages.run("evaluate", config.model_dump(), tuple(graphs.values()), build)

    def _race(self, backends: dict[str, Any]) -> dict[str, Any]:
        self._reporter.say("speed: every model in turn, one sequence")
        contenders = {
            TORCH if name == TEACHER else name: tandem_contender(backend)
            for name, backend in backends.items()
        }
        contenders[TRANSFORMERS] = transformers_contender(
            _load_model(self._teacher.path, torch.bfloat16)
        )
        config = self._config.evaluate
        vocab_size = backends[TEACHER].info.vocab_size
        return race(contenders, vocab_size, config.num_timed_tokens, config.num_rounds)

    def _packaged(
        self,
        pruned: Stage,
        distilled: Stage,
        graphs: dict[str, Stage],
        evaluated: Stage,
        lineage: tuple[Stage, ...],
    ) -> Path:
        summary = _read_json(evaluated.path / "summary.json")
        variants = {
            name: describe_variant(name, stage.path, self._config, summary)
            for name, stage in graphs.items()
        }
        default = choose_default(variants)
        target = self._config.output_dir / "bundle"
        records = tuple(stage.record for stage in lineage)
        if is_packaged(target, records, variants, default):
            self._reporter.say(f"bundle: finished before, {target}, default variant {default}")
            return target
        partial = fresh(target.with_name("bundle.partial"))
        removed = _removed_layers(pruned)
        num_layers = _read_json(distilled.path / "config.json")["num_hidden_layers"]
        write_bundle(
            partial,
            student_dir=distilled.path,
            variant_dirs={name: stage.path for name, stage in graphs.items()},
            eval_dir=evaluated.path,
            teacher=self._teacher.reference.model_copy(
                update={"local_path": str(self._teacher.path.resolve())}
            ),
            student=StudentInfo(
                num_parameters=count_parameters([distilled.path / "model.safetensors"])[0],
                num_layers=num_layers,
                kept_layers=tuple(_kept_layers(removed, num_layers + len(removed))),
                dtype="float32",
            ),
            lineage=records,
            variants=variants,
            default_variant=default,
            metrics=describe_evaluation(self._config, summary),
        )
        verify_bundle(partial)
        fresh(target).rmdir()
        partial.replace(target)
        self._reporter.say(f"bundle: {target}, default variant {default}")
        return target


def select_tasks(config: ExportConfig) -> list[Task]:
    """Return the first `max_train` and `max_test` built-in tasks of their splits."""
    tasks = builtin_tasks(config.tasks.seed)
    limits = {"train": config.tasks.max_train, "test": config.tasks.max_test}
    return [
        task
        for split, limit in limits.items()
        for task in [t for t in tasks if t.split == split][:limit]
    ]


def _examples(sampled: Stage, split: str) -> list[Example]:
    rows = read_completions(sampled.path / ROWS_NAME)
    return [row.example for row in rows if row.split == split]


def _removed_layers(pruned: Stage) -> list[int]:
    return [removal["layer"] for removal in _read_json(pruned.path / "removals.json")]


def _kept_layers(removed: Sequence[int], num_teacher_layers: int) -> list[int]:
    return [layer for layer in range(num_teacher_layers) if layer not in removed]


def _load_model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    return model.eval()


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the teacher's tokenizer and generation config to where its student was saved.

    Older folders have the chat template in tokenizer_config.json; the student gets it as a file.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
    template = target / "chat_template.jinja"
    if not template.exists():
        config = _read_json(source / "tokenizer_config.json")
        template.write_text(config["chat_template"], encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
