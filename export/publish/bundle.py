"""The last step of an export: judge the variants, write report and bundle, verify it.

`student/` opens in transformers, `onnx/<variant>/` in onnxruntime, optimum and onnxruntime-genai.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bundle.errors import BundleError
from bundle.hashing import hash_file
from bundle.manifest import (
    Evaluation,
    Manifest,
    StageRecord,
    StudentInfo,
    TeacherReference,
    Variant,
    write_manifest,
)
from bundle.verify import list_entries, verify_bundle
from export.measure.summary import read_summary
from export.publish.finished import FinishedRun
from export.publish.gates import describe_evaluation, describe_variant
from export.publish.report import write_report
from export.publish.report_data import collect_report
from export.publish.select import GateError, choose_default
from export.publish.verify import verify_bundle_deep
from export.run.files import writing_to
from export.run.stages import RECORD_NAME, fresh

REPORT_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The variants with their gates judged, the one that is served by default, what it all was."""

    variants: Mapping[str, Variant]
    default: str
    evaluation: Evaluation


def publish(run: FinishedRun, target: Path, say: Callable[[str], None]) -> None:
    """Write a bundle from finished stages to `target`, unless it is there already.

    GateError when no variant passed; the report of what failed is then in the output folder.
    """
    summary = read_summary(run.artifacts.evaluation)
    variants = {
        name: describe_variant(name, folder, run.config, summary)
        for name, folder in run.artifacts.graphs.items()
    }
    report = run.config.output_dir / REPORT_NAME
    try:
        default = choose_default(variants, run.config.select)
    except GateError:
        write_report(report, collect_report(run, variants, summary, default=None))
        say(f"what failed, and where the quality went: {report}")
        raise
    if is_packaged(target, run.records, variants, default):
        shutil.rmtree(_aside(target), ignore_errors=True)  # of a run killed before it did so
        _restore_report(target / "eval" / REPORT_NAME, report)
        say(f"bundle: finished before, {target}, default variant {default}")
        return
    partial = target.with_name(f"{target.name}.partial")
    with writing_to(partial):
        write_report(report, collect_report(run, variants, summary, default=default))
        verdicts = Verdicts(variants, default, describe_evaluation(run.config, summary))
        write_bundle(fresh(partial), run, verdicts, report)
    verify_bundle_deep(partial)
    put_in_place(partial, target)
    say(f"bundle: {target}, default variant {default}; read {target / 'eval' / REPORT_NAME}")


def write_bundle(target: Path, run: FinishedRun, verdicts: Verdicts, report: Path) -> Manifest:
    """Write a bundle into the empty folder `target` and return its manifest."""
    _copy_stage(run.artifacts.student, target / "student")
    for name, folder in run.artifacts.graphs.items():
        _copy_stage(folder, target / "onnx" / name)
    _copy_stage(run.artifacts.evaluation, target / "eval")
    shutil.copy(report, target / "eval")
    teacher, student = run.describe_teacher(), run.describe_student()
    card = model_card(teacher, student, verdicts)
    (target / "README.md").write_text(card, encoding="utf-8")
    manifest = Manifest(
        created_at=datetime.now(UTC),
        tandem_version=version("tandem"),
        files=list_entries(target),
        tokenizer_sha256=hash_file(target / "student" / "tokenizer.json"),
        chat_template_sha256=hash_file(target / "student" / "chat_template.jinja"),
        teacher=teacher,
        student=student,
        lineage=run.records,
        variants=dict(verdicts.variants),
        default_variant=verdicts.default,
        metrics=verdicts.evaluation,
    )
    write_manifest(target, manifest)
    return manifest


def is_packaged(
    target: Path,
    lineage: tuple[StageRecord, ...],
    variants: Mapping[str, Variant],
    default_variant: str,
) -> bool:
    """Say whether an intact bundle of just these stages and verdicts lies at `target`."""
    try:
        manifest = verify_bundle(target)
    except BundleError:
        return False
    found = (manifest.lineage, manifest.variants, manifest.default_variant)
    return found == (lineage, dict(variants), default_variant)


def _copy_stage(source: Path, target: Path) -> None:
    """Copy what a stage made, but not what it needed on the way.

    With the modes of new files: the writers of weights leave files that only their owner can read,
    and a server is another user.
    """
    working = (RECORD_NAME, "checkpoints", "on-policy-*")
    ignore = shutil.ignore_patterns(*working)
    shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a whole bundle to where another may lie, which is kept until then."""
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.replace(aside)
    partial.replace(target)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _restore_report(packaged: Path, report: Path) -> None:
    """Put the bundle's report back where a run with stricter gates left one of its failure."""
    if not report.exists() or report.read_bytes() != packaged.read_bytes():
        shutil.copy(packaged, report)


_CARD_METRICS = (
    "kl_to_student",
    "kl_to_teacher",
    "argmax_agreement_with_teacher",
    "decode_tokens_per_s",
)


def model_card(teacher: TeacherReference, student: StudentInfo, verdicts: Verdicts) -> str:
    """Return the bundle's README.md: everything in it is in the manifest too."""
    metrics = verdicts.evaluation
    rows = [_card_row(n, v, n == verdicts.default) for n, v in verdicts.variants.items()]
    return "\n".join(
        [
            "# A Tandem student",
            "",
            f"Distilled from `{teacher.source}` ({teacher.num_parameters / 1e6:.0f} M parameters) "
            f"into {student.num_layers} layers, {student.num_parameters / 1e6:.0f} M parameters.",
            "",
            f"Measured on the teacher's answers to {metrics.num_prompts} held-out prompts "
            f"(temperature {metrics.temperature:g}); KL in nats per token; speed of one sequence "
            "on the machine that exported.",
            "",
            "| variant | size | KL to float student | KL to teacher | top-1 agreement "
            "| tokens/s | gates |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "`manifest.json` holds the hashes, the lineage and all numbers.",
            "",
        ]
    )


def _card_row(name: str, variant: Variant, is_default: bool) -> str:
    shown = {key: variant.metrics.get(key, math.nan) for key in _CARD_METRICS}
    return (
        f"| {name}{' (default)' if is_default else ''} | {variant.size_bytes / 1e6:.0f} MB "
        f"| {shown['kl_to_student']:.4f} | {shown['kl_to_teacher']:.3f} "
        f"| {shown['argmax_agreement_with_teacher']:.3f} | {shown['decode_tokens_per_s']:.0f} "
        f"| {_verdict(variant)} |"
    )


def _verdict(variant: Variant) -> str:
    if not variant.gates:
        return "not measured"
    return "passed" if variant.is_passed else "FAILED"
