"""The last step of an export: judge the variants, write report and bundle, verify it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bundle.manifest import StudentInfo
from bundle.model_folder import open_model_folder
from export.publish.bundle import is_packaged, write_bundle
from export.publish.gates import describe_evaluation, describe_variant, read_summary
from export.publish.report import write_report
from export.publish.report_data import collect_report
from export.publish.select import GateError, choose_default
from export.publish.verify import verify_bundle_deep
from export.run.files import read_json, writing_to
from export.run.stages import fresh

if TYPE_CHECKING:
    from export.pipeline import Pipeline

REPORT_NAME = "report.html"


def package(pipeline: Pipeline) -> Path:
    """Write `OUTPUT_DIR/bundle` from finished stages, unless it is there already.

    GateError when no variant passed; the report of what failed is then in OUTPUT_DIR.
    """
    say, stages = pipeline.reporter.say, pipeline.stages
    summary = read_summary(pipeline.path(pipeline.evaluated))
    variants = {
        name: describe_variant(name, pipeline.path(spec), pipeline.config, summary)
        for name, spec in pipeline.graphs.items()
    }
    report = pipeline.config.output_dir / REPORT_NAME
    try:
        default = choose_default(variants, pipeline.config.select)
    except GateError:
        write_report(report, collect_report(pipeline, variants, summary, default=None))
        say(f"what failed, and where the quality went: {report}")
        raise
    target = pipeline.config.output_dir / "bundle"
    records = tuple(stages.finished(spec).record for spec in pipeline.specs)
    if is_packaged(target, records, variants, default):
        shutil.rmtree(_aside(target), ignore_errors=True)  # of a run killed before it did so
        _restore_report(target / "eval" / REPORT_NAME, report)
        say(f"bundle: finished before, {target}, default variant {default}")
        return target
    partial = target.with_name("bundle.partial")
    with writing_to(partial):
        write_report(report, collect_report(pipeline, variants, summary, default=default))
        write_bundle(
            fresh(partial),
            student_dir=pipeline.path(pipeline.distilled),
            variant_dirs={name: pipeline.path(spec) for name, spec in pipeline.graphs.items()},
            eval_dir=pipeline.path(pipeline.evaluated),
            report=report,
            teacher=pipeline.teacher.reference.model_copy(
                update={
                    "inputs": dict(pipeline.teacher.files),
                    "local_path": str(pipeline.teacher.path.resolve()),
                }
            ),
            student=_describe_student(pipeline),
            lineage=records,
            variants=variants,
            default_variant=default,
            metrics=describe_evaluation(pipeline.config, summary),
        )
    verify_bundle_deep(partial)
    _put_in_place(partial, target)
    say(f"bundle: {target}, default variant {default}; read {target / 'eval' / REPORT_NAME}")
    return target


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a whole bundle to where another may lie, which is kept until then."""
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.replace(aside)
    partial.replace(target)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name("bundle.old")


def _restore_report(packaged: Path, report: Path) -> None:
    """Put the bundle's report back where a run with stricter gates left one of its failure."""
    if not report.exists() or report.read_bytes() != packaged.read_bytes():
        shutil.copy(packaged, report)


def _describe_student(pipeline: Pipeline) -> StudentInfo:
    folder = pipeline.path(pipeline.distilled)
    num_layers: int = read_json(folder / "config.json")["num_hidden_layers"]
    kept = pipeline.kept_layers(num_layers + len(pipeline.removed_layers))
    return StudentInfo(
        num_parameters=open_model_folder(folder, has_tokenizer=False).num_parameters,
        num_layers=num_layers,
        kept_layers=None if kept is None else tuple(kept),
        dtype="float32",
    )
