"""A pretrained checkpoint as the student, where it is compatible with the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bundle.model_config import read_model_config
from bundle.model_folder import open_model_folder
from export.run.errors import ExportError
from serve.models.pretrained import load_pretrained
from serve.text.tokenizer import Tokenizer
from serve.text.tokenizer_equality import tokenizer_difference

MAX_COMPRESSION = 10.0
"""Teacher parameters per student parameter up to which distillation is known to work well."""


def load_student(student_folder: Path, teacher_folder: Path) -> Any:
    """Return the checkpoint in `student_folder` in float32, ready to be trained.

    Its tokenizer must be the teacher's, however files spell it (`serve.text.tokenizer_equality`);
    the vocabularies of the two models may be padded beyond it to different sizes. ExportError when
    the tokenizers differ or a vocabulary is too small; ModelFolderError when a folder is not safe
    to load or not supported.
    """
    student = open_model_folder(student_folder)
    check_same_tokenizer(student_folder, teacher_folder)
    tokenizer = Tokenizer.load(teacher_folder)
    for folder in (student_folder, teacher_folder):
        check_rows(folder, tokenizer)
    return load_pretrained(student, torch.float32)


def check_rows(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ExportError unless the model in `folder` has a row for every token.

    More rows are padding. With fewer a bundle would have tokens that its student does not know.
    """
    num_rows = read_model_config(folder).vocab_size
    last = tokenizer.num_tokens - 1
    if last >= num_rows:
        raise ExportError(
            f"{folder / 'config.json'} has vocab_size {num_rows}, but the tokenizer has ids up to "
            f"{last}, which is {tokenizer.token_text(last)!r}: resize the model's embeddings to "
            "the tokenizer, or take the tokens without a row out of tokenizer.json"
        )


def compression_warning(num_teacher_parameters: int, num_student_parameters: int) -> str | None:
    """Return what to tell a user whose student is very small for its teacher, None otherwise.

    >>> compression_warning(1_000, 100)
    >>> compression_warning(134_500_000, 8_000_000)[:53]
    'the student has 16.8 times fewer parameters than the '
    """
    ratio = num_teacher_parameters / num_student_parameters
    if ratio <= MAX_COMPRESSION:
        return None
    return (
        f"the student has {ratio:.1f} times fewer parameters than the teacher; above "
        f"{MAX_COMPRESSION:.0f}, distillation loses much: remove less, or distil in two steps, "
        "through a model of a size between"
    )


def check_same_tokenizer(student_folder: Path, teacher_folder: Path) -> None:
    """Raise ExportError unless the student's tokenizer does what the teacher's does."""
    if difference := tokenizer_difference(student_folder, teacher_folder):
        raise ExportError(
            f"student {student_folder} has another tokenizer than the teacher {teacher_folder}: "
            f"another {difference}; token ids would mean different text"
        )
