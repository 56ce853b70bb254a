from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from export.run.errors import ExportError
from export.run.processes import World
from export.run.settings import CacheConfig, SampleConfig
from export.run.training import DistillConfig, PhaseConfig
from export.student.grid import BlockGrid
from export.student.logits_cache import write_logits_cache
from export.student.phases import (
    HELD_OUT_NAME,
    Distillation,
    GridTraining,
    HeldOutLog,
    Text,
    linear_grids,
    round_prompts,
)
from export.student.prune import drop_layers, shrink_mlp
from export.student.step import CachedPair
from export.student.trainer import Trainer
from serve.text.real_tokens import EVERY_ROW, RealTokens
from tests.support.random_models import random_examples, random_model

EXAMPLES = random_examples([(3, 4), (5, 6), (2, 5), (4, 3)])
TEXT = Text(EXAMPLES, EXAMPLES[:2], frozenset({2}))
SHARP = PhaseConfig(num_epochs=6, learning_rate=3e-3, alpha=1.0, tokens_per_step=16)


def make(
    folder: Path, *phases: PhaseConfig, freeze: bool = False, narrow: bool = False, **changed: Any
) -> Distillation:
    """Distil a random model into its layers 0 and 2."""
    teacher = random_model(num_layers=3)
    student = drop_layers(teacher, [0, 2])
    if narrow:
        student = shrink_mlp(student, [torch.arange(64.0)] * 2, 0.5)
    config = DistillConfig(phases=phases or (PhaseConfig(),), freeze_shared_layers=freeze)
    settings: dict[str, Any] = {"config": config, "sample": SampleConfig(max_tokens=4)}
    settings |= {"kept_layers": [0, 2], "cache": None, "real_tokens": EVERY_ROW, "world": World()}
    return Distillation(student, teacher, TEXT, folder, **(settings | changed))


def test_held_out_kl_is_measured_once_per_number(tmp_path: Path) -> None:
    log = HeldOutLog.open(tmp_path)
    log.add(0, lambda: 0.5)
    log.add(0, lambda: 0.7)
    log.add(1, lambda: 0.25)
    assert HeldOutLog.open(tmp_path).forward_kl == [0.5, 0.25] == log.forward_kl
    assert json.loads((tmp_path / HELD_OUT_NAME).read_text()) == [0.5, 0.25]


def test_distillation_lowers_the_held_out_kl(tmp_path: Path) -> None:
    distillation = make(tmp_path, SHARP, SHARP)
    Trainer(tmp_path / "checkpoints").run(distillation.phases())
    distillation.measure(2)
    before, between, after = distillation.held_out.forward_kl
    assert before > between > 0 and before > after > 0
    assert not distillation.student.training


def test_distillation_in_another_process_measures_nothing(tmp_path: Path) -> None:
    make(tmp_path, world=World(rank=1, size=2)).measure(0)
    assert not (tmp_path / HELD_OUT_NAME).exists()


def test_frozen_layers_are_those_below_the_first_removed_one(tmp_path: Path) -> None:
    distillation = make(tmp_path, freeze=True)
    trained = {n for n, p in distillation.student.named_parameters() if p.requires_grad}
    assert trained
    assert all("layers.1." in name or name == "model.norm.weight" for name in trained)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kept_layers": None}, r"freeze_shared_layers is true.*set it to false"),
        ({"kept_layers": [1, 2]}, r"freeze_shared_layers is true.*set it to false"),
        ({"narrow": True}, "kept_mlp_share 1"),
    ],
)
def test_frozen_layers_that_are_not_shared_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        make(tmp_path, freeze=True, **changed)


def test_phase_sees_attention_maps_where_they_are_matched_and_is_fast_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, dense = random_model(num_layers=3), CacheConfig(kind="dense")
    cache = write_logits_cache(tmp_path / "c", teacher, EXAMPLES, dense, teacher_sha256="0" * 64)
    phases = PhaseConfig(attention_weight=1.0), PhaseConfig(teacher_logits="cache")
    distillation = make(tmp_path, *phases, cache=cache)
    chosen: list[str] = []
    monkeypatch.setattr(distillation.student, "set_attn_implementation", chosen.append)
    first, second = (build() for build in distillation.phases())
    assert any(name.startswith("matching.projections") for name in first.parameters.named())
    assert isinstance(second.forward, CachedPair)
    assert all(name.startswith("student.") for name in second.parameters.named())
    assert chosen == ["eager", "sdpa"]


def test_on_policy_rounds_cover_every_prompt_once_an_epoch_in_another_order() -> None:
    prompts = [(i,) for i in range(10)]
    phase = PhaseConfig(data="student", num_prompts_per_round=4)
    rounds = [round_prompts(prompts, phase, index) for index in range(6)]
    assert [len(r) for r in rounds] == [4, 4, 2] * 2
    epochs = [[*chain(*rounds[:3])], [*chain(*rounds[3:])]]
    assert [sorted(epoch) for epoch in epochs] == [prompts, prompts]
    assert epochs[0] != epochs[1]
    assert rounds == [round_prompts(prompts, phase, index) for index in range(6)]


def test_on_policy_phase_trains_on_the_students_own_answers(tmp_path: Path) -> None:
    phase = PhaseConfig(data="student", num_epochs=2, num_prompts_per_round=3)
    (build,) = make(tmp_path, phase).phases()
    built = build()
    assert built.num_rounds == 4
    answers = built.text(0)
    assert [e.prompt_token_ids for e in answers] == round_prompts(TEXT.prompts, phase, 0)
    assert all(1 <= len(e.completion_token_ids) <= 4 for e in answers)
    assert not set(answers) & set(EXAMPLES)


def test_linear_grids_are_chosen_by_the_layers_own_name() -> None:
    asked: list[str] = []

    def grid_of(name: str) -> BlockGrid:
        asked.append(name)
        return BlockGrid(8 if name == "lm_head" else 4, 16)

    grids = linear_grids(random_model(num_layers=1), grid_of)
    assert sorted(asked) == sorted(
        [*["qkv_proj"] * 3, "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    )
    assert grids["lm_head"].bits == 8
    assert grids["model.layers.0.self_attn.q_proj"].bits == 4


def test_grid_training_lowers_the_kl_to_the_float_student(tmp_path: Path) -> None:
    student = random_model(num_layers=2)
    grids = linear_grids(student, lambda name: BlockGrid(4, 16))
    float_student, real_tokens = random_model(num_layers=2), RealTokens(97)
    training = GridTraining(student, float_student, grids, {}, SHARP, TEXT, real_tokens)
    before = training.measure()
    Trainer(tmp_path).run([training.phase])
    assert 0 < training.measure() < before
