"""A run whose stages are all finished: what the report and the bundle are made of."""

from __future__ import annotations

from dataclasses import dataclass

from bundle.manifest import StageRecord, StudentInfo, TeacherReference
from bundle.model_folder import open_model_folder
from export.run.artifacts import Artifacts
from export.run.files import read_json
from export.run.settings import ExportConfig
from export.student.prune import kept_layers, read_removals
from export.teacher.source import TeacherFolder


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """`records` are those of all stages, in the order in which they ran."""

    config: ExportConfig
    teacher: TeacherFolder
    artifacts: Artifacts
    records: tuple[StageRecord, ...]

    def describe_teacher(self) -> TeacherReference:
        """Return the manifest's entry of the teacher, with the folder where it lies here."""
        inputs, local_path = dict(self.teacher.files), str(self.teacher.path.resolve())
        return self.teacher.reference.model_copy(
            update={"inputs": inputs, "local_path": local_path}
        )

    def describe_student(self) -> StudentInfo:
        """Return the manifest's entry of the student, before it is quantized."""
        folder = self.artifacts.student
        num_layers: int = read_json(folder / "config.json")["num_hidden_layers"]
        kept = None  # the student was not cut out of the teacher
        if self.config.student is None:
            removals = read_removals(self.artifacts.untrained)
            kept = tuple(kept_layers(removals, num_layers + len(removals)))
        return StudentInfo(
            num_parameters=open_model_folder(folder, has_tokenizer=False).num_parameters,
            num_layers=num_layers,
            kept_layers=kept,
            dtype="float32",
        )
