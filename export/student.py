"""A pretrained checkpoint as the student, where it is compatible with the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as AutoModel

from export.config import ExportError
from export.teacher import check_folder
from serve.tokenization import Tokenizer
from serve.tokenizer_equality import tokenizer_difference
from serve.torch_backend import check_supported

MAX_COMPRESSION = 10.0
"""Teacher parameters per student parameter up to which distillation is known to work well."""


def load_student(student_folder: Path, teacher_folder: Path) -> Any:
    """Return the checkpoint in `student_folder` in float32, ready to be trained.

    Its tokenizer must be the teacher's, however files spell it (`serve.tokenizer_equality`); the
    vocabularies of the two models may be padded beyond it to different sizes. ExportError when the
    tokenizers differ, a vocabulary is too small, the architecture is not supported or weights are
    missing; TeacherError when the folder is not plain safetensors (`export.teacher.check_folder`).
    """
    check_folder(student_folder)
    _check_same_tokenizer(student_folder, teacher_folder)
    tokenizer = Tokenizer.load(teacher_folder)
    for folder in (student_folder, teacher_folder):
        check_rows(folder, tokenizer)
    _check_architecture(student_folder)
    model, loading = AutoModel.from_pretrained(
        student_folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ExportError(
            f"student {student_folder} lacks weights of its architecture, "
            f"{sorted(loading['missing_keys'])[0]} first: they would be random"
        )
    return model


def check_rows(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ExportError unless the model in `folder` has a row for every token.

    More rows are padding. With fewer a bundle would have tokens that its student does not know.
    """
    num_rows = AutoConfig.from_pretrained(folder, trust_remote_code=False).vocab_size
    if num_rows < tokenizer.num_tokens:
        raise ExportError(
            f"{folder / 'config.json'} has vocab_size {num_rows}, but the tokenizer has "
            f"{tokenizer.num_tokens} tokens, {tokenizer.token_text(num_rows)!r} with the id "
            f"{num_rows} among them: resize the model's embeddings to the tokenizer, or take the "
            "tokens without a row out of tokenizer.json"
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


def _check_same_tokenizer(student_folder: Path, teacher_folder: Path) -> None:
    if difference := tokenizer_difference(student_folder, teacher_folder):
        raise ExportError(
            f"student {student_folder} has another tokenizer than the teacher {teacher_folder}: "
            f"another {difference}; token ids would mean different text"
        )


def _check_architecture(folder: Path) -> None:
    try:
        check_supported(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except ValueError as error:
        raise ExportError(f"student {folder}: {error}") from None
