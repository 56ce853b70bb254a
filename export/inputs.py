"""What a run reads: its recipe, its models and its tasks, each opened once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property

from export.checks import fitting_tasks
from export.record import find_template_date
from export.run.processes import World
from export.run.settings import ExportConfig
from export.run.stages import RunReporter
from export.teacher.source import TeacherFolder, resolve_teacher
from export.teacher.task_sources import Loaded
from serve.text.real_tokens import RealTokens
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunInputs:
    """`student` is the pretrained one; None where one is pruned, and where it is yet to be fetched
    (then its stage and those behind it cannot be described)."""

    config: ExportConfig
    teacher: TeacherFolder
    student: TeacherFolder | None = None

    @cached_property
    def template_date(self) -> date:
        """What chat templates tell as today's date, however many days the run takes."""
        return find_template_date(self.config.output_dir)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's, with the date that prompts of this run tell."""
        return Tokenizer.load(self.teacher.path, self.template_date)

    @property
    def real_tokens(self) -> RealTokens:
        """Those of teacher and student, which share a tokenizer."""
        return self.tokenizer.real_tokens

    @cached_property
    def loaded(self) -> Loaded:
        """The tasks, and what was left out of their sources."""
        return fitting_tasks(self.config, self.teacher, lambda: self.tokenizer)


def open_inputs(
    config: ExportConfig,
    reporter: RunReporter,
    world: World,
    models: Sequence[TeacherFolder | None] = (),
) -> RunInputs:
    """Find or fetch the teacher, and the pretrained student if there is one.

    `models` are those of them that were found before. The main process fetches, the others wait and
    then find what it fetched.
    """
    if not world.is_main:
        world.wait()
    teacher, student, *_ = (*models, None, None)
    if teacher is None:
        teacher = resolve_teacher(config.teacher, config.cache_dir, reporter.say)
    if student is None and config.student is not None:
        student = resolve_teacher(config.student, config.cache_dir, reporter.say)
    if world.is_main:
        world.wait()
    return RunInputs(config, teacher, student)
