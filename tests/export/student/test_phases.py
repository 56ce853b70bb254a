from __future__ import annotations

import json
from collections.abc import Callable
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

LENGTHS = [(3, 4), (5, 6), (2, 5), (4, 3)]


@pytest.fixture
def text() -> Text:
    examples = random_examples(LENGTHS)
    return Text(examples, examples[:2], frozenset({2}))


@pytest.fixture
def make_distillation(text: Text, tmp_path: Path) -> Callable[..., Distillation]:
    def make(*phases: PhaseConfig, freeze: bool = False, **changed: Any) -> Distillation:
        teacher = random_model(num_layers=3)
        settings: dict[str, Any] = {
            "config": DistillConfig(phases=phases or (PhaseConfig(),), freeze_shared_layers=freeze),
            "sample": SampleConfig(max_tokens=4),
            "kept_layers": [0, 2],
            "cache": None,
            "real_tokens": EVERY_ROW,
            "world": World(),
        }
        student = changed.pop("student", drop_layers(teacher, [0, 2]))
        return Distillation(student, teacher, text, tmp_path, **(settings | changed))

    return make


def test_held_out_kl_is_measured_once_per_number(tmp_path: Path) -> None:
    log = HeldOutLog.open(tmp_path)
    log.add(0, lambda: 0.5)
    log.add(0, lambda: 0.7)
    log.add(1, lambda: 0.25)
    assert HeldOutLog.open(tmp_path).forward_kl == [0.5, 0.25] == log.forward_kl
    assert json.loads((tmp_path / HELD_OUT_NAME).read_text()) == [0.5, 0.25]


def test_training_lowers_the_held_out_kl(make_distillation: Callable[..., Distillation], tmp_path: Path) -> None:  # fmt: skip
    phase = PhaseConfig(num_epochs=8, learning_rate=3e-3, alpha=1.0, tokens_per_step=16)
    distillation = make_distillation(phase, phase)
    Trainer(tmp_path / "checkpoints").run(distillation.phases())
    distillation.measure(2)
    before, between, after = distillation.held_out.forward_kl
    assert before > between > 0 and before > after > 0


def test_other_processes_measure_nothing(make_distillation: Callable[..., Distillation], tmp_path: Path) -> None:  # fmt: skip
    make_distillation(world=World(rank=1, size=2)).measure(0)
    assert not (tmp_path / HELD_OUT_NAME).exists()


def test_frozen_layers_are_those_below_the_first_removed_one(
    make_distillation: Callable[..., Distillation],
) -> None:
    distillation = make_distillation(freeze=True)
    trained = {n for n, p in distillation.student.named_parameters() if p.requires_grad}
    assert trained
    assert all("layers.1." in name or name == "model.norm.weight" for name in trained)


@pytest.mark.parametrize("kept_layers", [None, [1, 2]])
def test_freezing_layers_that_are_not_shared_is_refused(
    make_distillation: Callable[..., Distillation], kept_layers: list[int] | None
) -> None:
    with pytest.raises(ExportError, match=r"freeze_shared_layers is true.*set it to false"):
        make_distillation(freeze=True, kept_layers=kept_layers)


def test_freezing_layers_whose_mlp_was_narrowed_is_refused(
    make_distillation: Callable[..., Distillation],
) -> None:
    student = drop_layers(random_model(num_layers=3), [0, 2])
    narrow = shrink_mlp(student, [torch.arange(64.0)] * 2, 0.5)
    with pytest.raises(ExportError, match="kept_mlp_share 1"):
        make_distillation(freeze=True, student=narrow)


def test_attention_is_eager_only_where_its_maps_are_matched(
    make_distillation: Callable[..., Distillation], text: Text, tmp_path: Path
) -> None:
    cache = write_logits_cache(
        tmp_path / "cache",
        random_model(num_layers=3),
        text.train,
        CacheConfig(kind="dense"),
        teacher_sha256="0" * 64,
    )
    phases = PhaseConfig(attention_weight=1.0), PhaseConfig(teacher_logits="cache")
    distillation = make_distillation(*phases, cache=cache)
    first, second = distillation.phases()
    names = first().parameters.named()
    assert any(name.startswith("matching.projections") for name in names)
    assert distillation.student.config._attn_implementation == "eager"
    built = second()
    assert isinstance(built.forward, CachedPair)
    assert all(name.startswith("student.") for name in built.parameters.named())
    assert distillation.student.config._attn_implementation == "sdpa"


def test_probe_is_a_share(make_distillation: Callable[..., Distillation]) -> None:
    assert 0 <= make_distillation().probe() <= 1


def test_on_policy_rounds_cover_every_prompt_once_an_epoch_in_another_order() -> None:
    prompts = [(i,) for i in range(10)]
    phase = PhaseConfig(data="student", num_prompts_per_round=4)
    rounds = [round_prompts(prompts, phase, index) for index in range(6)]
    assert [len(r) for r in rounds] == [4, 4, 2] * 2
    epochs = [[*chain(*rounds[:3])], [*chain(*rounds[3:])]]
    assert [sorted(epoch) for epoch in epochs] == [prompts, prompts]
    assert epochs[0] != epochs[1]
    assert rounds == [round_prompts(prompts, phase, index) for index in range(6)]


def test_on_policy_phase_trains_on_the_students_own_answers(
    make_distillation: Callable[..., Distillation], text: Text
) -> None:
    phase = PhaseConfig(data="student", num_epochs=2, num_prompts_per_round=3)
    (build,) = make_distillation(phase).phases()
    built = build()
    assert built.num_rounds == 4
    answers = built.text(0)
    assert [e.prompt_token_ids for e in answers] == round_prompts(text.prompts, phase, 0)
    assert all(1 <= len(e.completion_token_ids) <= 4 for e in answers)
    assert not set(answers) & set(text.train)


def test_grids_are_chosen_by_the_layers_own_name() -> None:
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


def test_training_on_the_grid_lowers_the_kl_to_the_float_student(
    text: Text, tmp_path: Path
) -> None:
    student = random_model(num_layers=2)
    grids = linear_grids(student, lambda name: BlockGrid(4, 16))
    phase = PhaseConfig(num_epochs=8, learning_rate=3e-3, alpha=1.0, tokens_per_step=16)
    real_tokens = RealTokens(97)
    training = GridTraining(
        student, random_model(num_layers=2), grids, {}, phase, text, real_tokens
    )
    before = training.measure()
    Trainer(tmp_path).run([training.phase])
    assert 0 < training.measure() < before
