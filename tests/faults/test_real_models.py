"""Real runtimes under callers of every kind, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.ledger.journal import read_journal
from loadtest.ledger.ledger import Fault, Ledger, check
from tests.faults import real_models
from tests.support.tiny_bundle import MAX_MODEL_LEN, damage_bundle, shared_tiny_bundle

pytestmark = pytest.mark.nightly

SECONDS = 2.0


def run(folder: Path, bundle: Path, *flags: str) -> Ledger:
    given = ("--bundle", str(bundle), "--device", "cpu", "--threads", "1")
    length = ("--max-model-len", str(MAX_MODEL_LEN))
    return real_models.run(folder, [*given, *length, *flags], SECONDS)


@pytest.fixture(scope="module")
def onnx_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return run(folder, shared_tiny_bundle()), folder


def test_answers_among_others_are_those_alone(onnx_run: tuple[Ledger, Path]) -> None:
    ledger, _ = onnx_run
    assert ledger.violations == []
    assert ledger.codes["OK"] > 0 and ledger.num_compared > 0


def test_answers_of_torch_are_those_alone(tmp_path: Path) -> None:
    ledger = run(tmp_path, shared_tiny_bundle(), "--student-backend", "torch")
    assert ledger.violations == []
    assert ledger.codes["OK"] > 0 and ledger.num_compared > 0


def test_another_model_is_found(tmp_path: Path, onnx_run: tuple[Ledger, Path]) -> None:
    run(tmp_path, damage_bundle(shared_tiny_bundle(), tmp_path / "bundle"))
    _, folder = onnx_run
    journals = (
        read_journal([tmp_path / "callers.jsonl"]),
        read_journal([folder / "reference.jsonl"]),
    )
    ledger = check(*journals)
    assert ledger.count(Fault.ALTERED) > 0
    assert ledger.count(Fault.LOST) == ledger.count(Fault.DUPLICATED) == 0
