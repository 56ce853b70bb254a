"""`tandem export`: from a recipe to a bundle, whole or a stage at a time, and what became of it.

Each command imports what it needs when it runs, so that help and a wrong recipe answer at once.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from export.console import ConsoleReporter, open_console
from export.run.errors import ConfigError, ExportError
from export.run.recipe import Recipe, load_recipe
from export.run.variants import FLOAT_VARIANT

if TYPE_CHECKING:
    from export.pipeline import Pipeline
    from export.record import InputChange, RunRecord
    from export.run.processes import World
    from export.run.stages import StageSpec

HELP = """Turn a teacher into a verified bundle.

Exit codes: 0 done; 1 an expected error, in one line; 2 wrong usage or a wrong recipe; 3 a gate
failed; 4 resume: an input of the run has changed; 5 interrupted, finished stages are kept.
"""

app = typer.Typer(help=HELP, no_args_is_help=True)

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE.yaml", exists=True, dir_okay=False,
        help="A YAML file that says what to export, such as export/recipes/demo.yaml.",
    ),
]  # fmt: skip
RunPath = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="The output folder of a run.")
]
BundlePath = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="The folder of a bundle.")
]


class InterruptedRunError(ExportError):
    """A run was told to stop; the text says how it goes on."""

    exit_code = 5


# --- before and beside a run


@app.command()
def plan(recipe: RecipePath) -> None:
    """Print the whole recipe, and what its stages will take; nothing is fetched or written."""
    loaded = _load(recipe)
    from export.estimates import Machine
    from export.plan import make_plan, print_plan

    print_plan(make_plan(loaded.config, Machine.measure(), loaded.place), open_console())


@app.command()
def status(
    run: Annotated[
        Path, typer.Argument(help="The output folder of a run, or a recipe.", exists=True)
    ],
) -> None:
    """Show how far each stage of a run is; it may be running."""
    from export.record import changes_on_disk, find_run, read_run
    from export.status import read_status, render_status
    from export.teacher.source import find_teacher

    record: RunRecord | None
    if run.is_dir():
        record = read_run(run)
        stages = read_status(record.config, record.teacher_folder)
    else:
        config = _load(run).config
        record = find_run(config.output_dir)
        stages = read_status(config, find_teacher(config.teacher, config.cache_dir))
    open_console().print(render_status(stages))
    for change in changes_on_disk(record) if record else ():
        typer.echo(f"changed: {change}")


# --- running


@app.command()
def run(recipe: RecipePath) -> None:
    """Run every stage of a recipe that is not finished yet, and write the bundle."""
    loaded = _load(recipe)
    with _running("resume", loaded.config.output_dir) as (world, reporter):
        _begin(loaded, reporter, world).package()


@app.command()
def resume(output_dir: RunPath) -> None:
    """Go on with the run in a folder, provided that its inputs are what they were."""
    from export.record import check_unchanged, file_changes, read_run

    record = read_run(output_dir)
    check_unchanged(record, file_changes(record))
    with _running("resume", output_dir) as (world, reporter):
        from export.pipeline import open_pipeline

        pipeline = open_pipeline(record.config, reporter, world)
        check_unchanged(record, _model_changes(record, pipeline))
        pipeline.package()


def _load(path: Path) -> Recipe:
    """Read a recipe, and say on stderr what of it lies elsewhere than beside it."""
    recipe = load_recipe(path)
    for note in recipe.notes:
        typer.echo(f"tandem: {note}", err=True)
    return recipe


def _begin(recipe: Recipe, reporter: ConsoleReporter, world: World) -> Pipeline:
    """Open a recipe's pipeline, check what can be checked before any work, and write run.json."""
    from export.estimates import Machine
    from export.pipeline import open_pipeline
    from export.plan import make_plan
    from export.record import file_changes, find_run, record_run

    config, machine = recipe.config, Machine(matmul_flops_per_s=1.0)  # no times are asked for
    plan = make_plan(config, machine, recipe.place)
    pipeline = open_pipeline(config, reporter, world, plan.models)
    if None in plan.models:  # fetched by now, and never looked at before
        plan = make_plan(config, machine, recipe.place)
    for note in plan.notes:
        reporter.say(note)
    if world.is_main:
        last = find_run(config.output_dir)
        if last is not None:
            for change in (*file_changes(last), *_model_changes(last, pipeline)):
                reporter.say(f"changed: {change}; what follows from it runs again")
        record_run(recipe.path, config, pipeline.inputs.teacher, pipeline.inputs.student)
    return pipeline


def _model_changes(record: RunRecord, pipeline: Pipeline) -> list[InputChange]:
    from export.record import ModelInputs, model_changes

    config, student = pipeline.config, pipeline.inputs.student
    return model_changes(
        record,
        ModelInputs.of(config.teacher, pipeline.inputs.teacher),
        ModelInputs.of(config.student or "", student) if student else None,
    )


# A stage's command: which stages it ends with, and its help.
_STAGES: Mapping[str, tuple[Callable[[Pipeline], list[StageSpec]], str]] = {
    "sample": (lambda p: [p.sampled], "Let the teacher answer every prompt."),
    "accept": (lambda p: [p.accepted], "Choose the answers that are trained on."),
    "cache": (lambda p: [p.cached], "Keep the teacher's logits on disk."),
    "prune": (lambda p: [p.untrained], "Make the student, by pruning or from a checkpoint."),
    "distill": (lambda p: [p.distilled], "Train the student."),
    "onnx": (lambda p: [p.graph(FLOAT_VARIANT)], "Write the student's float graph."),
    "quantize": (lambda p: list(p.graphs.values()), "Write the graphs of all variants."),
    "evaluate": (lambda p: [p.evaluated], "Measure every variant."),
}


def _add_stage_command(name: str) -> None:
    select, summary = _STAGES[name]

    @app.command(name, help=f"{summary} Runs what is missing before it, and no further.")
    def run_stage(recipe: RecipePath) -> None:
        loaded = _load(recipe)
        if name == "cache" and loaded.config.cache.kind == "none":
            raise ConfigError(
                f"{recipe}: cache.kind is 'none', so there is nothing to cache: choose dense, "
                "top_k or random_sampling"
            )
        with _running(name, recipe) as (world, reporter):
            pipeline = _begin(loaded, reporter, world)
            for spec in select(pipeline):
                pipeline.run(spec)


for _name in _STAGES:
    _add_stage_command(_name)
app.command("package", help="Write the bundle; the same as `run`.")(run)


@contextmanager
def _running(resume_by: str, path: Path) -> Iterator[tuple[World, ConsoleReporter]]:
    """Join the processes of this run; SIGINT and SIGTERM become InterruptedRunError, whose text
    names the command that goes on.

    The processes that only help to train write nothing, so they end where they are: one that waits
    for the others in C++ would not hear a Python handler.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from export.run.processes import World

        world = World.from_environment()
        if not world.is_main:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
        reporter = ConsoleReporter(is_quiet=not world.is_main)
        try:
            yield world, reporter
        finally:
            reporter.close()
            world.close()
    except KeyboardInterrupt:
        command = shlex.join(["tandem", "export", resume_by, str(path)])
        raise InterruptedRunError(
            f"interrupted; everything finished is kept, `{command}` goes on from there"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# --- bundles


@app.command()
def verify(bundle: BundlePath) -> None:
    """Compare every file of a bundle with its manifest, and run every graph in a new process."""
    from export.publish.verify import verify_bundle_deep

    manifest = verify_bundle_deep(bundle)
    typer.echo(
        f"{bundle}: {len(manifest.files)} files are what the manifest says, "
        f"{len(manifest.variants)} graphs run"
    )


@app.command()
def compare(
    a: BundlePath,
    b: BundlePath,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare also where teachers, prompts or sampling differ; refused by default.",
        ),
    ] = False,
) -> None:
    """Compare what two bundles' exports measured: B minus A, with 95 % intervals."""
    from export.measure.compare import compare_bundles, render

    typer.echo(render(compare_bundles(a, b, is_forced=force)), nl=False)
