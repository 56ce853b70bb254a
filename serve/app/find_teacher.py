"""Which teacher is served beside a bundle's student, where nobody or somebody names one."""

from __future__ import annotations

import logging
from pathlib import Path

from bundle.errors import UserError, one_line
from bundle.hashing import hash_weights
from bundle.manifest import TeacherReference
from bundle.model_inputs import differing_inputs, hash_model_inputs
from serve.app.config import ServeConfig

logger = logging.getLogger(__name__)


def find_teacher(config: ServeConfig, reference: TeacherReference | None) -> Path | None:
    """Return the folder of the teacher to load; None, with a warning, when there is none.

    Without `--teacher` it is the one that the student was distilled from, as long as it still lies
    where the exporter saw it, as it was. Another one must be asked for, and is served with a
    warning: other weights, or another file that shapes ids or logits.

    Raises:
        UserError: the teacher is to be served alone, and is not there.
    """
    if config.no_teacher or config.teacher_address is not None:
        return None
    if isinstance(config.teacher, Path):
        if reference is not None:
            _warn_of_another(config.teacher, reference)
        return config.teacher
    assert reference is not None, "ServeConfig wants a bundle or a teacher"
    if problem := _why_not_there(reference):
        if config.no_student:
            raise UserError(f"--no-student: {problem}; give --teacher")
        logger.warning("serving the student alone: %s; give --teacher or --no-teacher", problem)
        return None
    return Path(reference.local_path or "")


def _warn_of_another(folder: Path, reference: TeacherReference) -> None:
    if folder.is_dir() and (changed := _changes(folder, reference)):
        logger.warning(
            "%s is not the teacher that the student was distilled from (%s): it differs in %s; "
            "divergences are from this other model",
            *(folder, reference.source, changed),
        )


def _changes(folder: Path, reference: TeacherReference) -> str:
    """Name what is not as it was when the student was distilled; empty when all is.

    Of a bundle that does not say what the other files were, the weights alone are compared.
    """
    changed = ["the weights"] if hash_weights(folder) != reference.weights_sha256 else []
    if reference.inputs is not None:
        changed += differing_inputs(reference.inputs, hash_model_inputs(folder))
    return one_line(", ".join(changed))


def _why_not_there(reference: TeacherReference) -> str:
    """Say why the distilled-from teacher cannot be served; empty when it can."""
    if reference.local_path is None:
        return "the bundle does not say where its teacher lies"
    folder = Path(reference.local_path)
    try:
        if not folder.is_dir():
            return f"its teacher is no longer at {folder}"
        changed = _changes(folder, reference)
    except OSError as error:
        return f"its teacher at {folder} cannot be read: {error.strerror}"
    if changed:
        return f"its teacher has changed since the student was distilled: {changed} in {folder}"
    return ""
