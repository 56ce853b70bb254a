from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from export.run.errors import ExportError
from export.run.settings import PruneConfig
from export.student.losses import forward_kl
from export.student.prune import (
    Removal,
    check_removable,
    drop_layers,
    kept_mlp_width,
    rank_channels,
    rank_layers,
    shrink_mlp,
)
from export.teacher.examples import Example
from serve.text.real_tokens import RealTokens
from tests.support.random_models import random_examples, random_model

INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TEXTS = random_examples([(4, 6), (5, 9)])


@pytest.fixture
def teacher() -> Any:
    return random_model("llama", num_layers=6)


def silence(model: Any, layer: int) -> None:
    """Make a layer add nothing to the hidden states."""
    block = model.model.layers[layer]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()


def rank(teacher: Any, num_removed: int, **changes: Any) -> list[Removal]:
    settings = {"first_candidate": 1, "num_candidates": 6} | changes
    return rank_layers(teacher, TEXTS, num_removed, **settings)


@torch.inference_mode()
def completion_logits(text: Example, *models: Any) -> list[torch.Tensor]:
    ids = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
    start = len(text.prompt_token_ids) - 1
    return [model(ids).logits[0, start:-1] for model in models]


def cost(teacher: Any, kept: list[int]) -> float:
    """KL(teacher ‖ teacher with the layers `kept`), per token."""
    student = drop_layers(teacher, kept)
    kls = [forward_kl(*completion_logits(text, student, teacher)) for text in TEXTS]
    return float(torch.cat(kls).mean())


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(INPUT_IDS).logits[0]


# --- which layers go


def test_rank_layers_removes_in_every_round_the_layer_whose_loss_costs_the_least_kl(
    teacher: Any,
) -> None:
    kept = list(range(6))
    for removal in rank(teacher, 2):
        costs = {layer: cost(teacher, [i for i in kept if i != layer]) for layer in kept[1:-1]}
        assert removal.layer == min(costs, key=costs.__getitem__)
        assert removal.kl == pytest.approx(costs[removal.layer], rel=1e-4)
        kept.remove(removal.layer)


def test_rank_layers_gives_rows_without_tokens_no_say(teacher: Any) -> None:
    real_tokens = RealTokens(60, (7,))
    quiet = rank(teacher, 1, real_tokens=real_tokens)
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.clone())
    teacher.lm_head.weight.data[[7, *range(60, 97)]] *= 20
    assert rank(teacher, 1, real_tokens=real_tokens) == quiet
    assert rank(teacher, 1) != quiet


@pytest.mark.parametrize("first_candidate", [0, 4])
def test_rank_layers_keeps_layers_below_the_first_candidate_and_the_last(
    teacher: Any, first_candidate: int
) -> None:
    for layer in (1, 5):
        silence(teacher, layer)
    num_removed = min(2, 5 - first_candidate)
    removed = {r.layer for r in rank(teacher, num_removed, first_candidate=first_candidate)}
    assert len(removed) == num_removed
    assert all(first_candidate <= layer < 5 for layer in removed)


@pytest.mark.parametrize(
    ("num_removed", "num_candidates", "expected"),
    [(1, 6, [4]), (3, 6, [4, 3, 2]), (2, 2, [4, 2]), (2, 9, [4, 3])],
)
def test_rank_layers_shows_progress_up_to_its_total(
    teacher: Any, num_removed: int, num_candidates: int, expected: list[int]
) -> None:
    shown: list[tuple[int, int]] = []
    rank(teacher, num_removed, num_candidates=num_candidates, progress=lambda *p: shown.append(p))
    assert shown == [(done, sum(expected)) for done in range(1, sum(expected) + 1)]


@pytest.mark.parametrize("num_removed", [0, 1, 2, 5])
@pytest.mark.parametrize(("first_candidate", "num_candidates"), [(1, 6), (1, 2), (5, 1), (9, 1)])
def test_check_removable_tells_before_any_work_what_ranking_would(
    teacher: Any, num_removed: int, first_candidate: int, num_candidates: int
) -> None:
    settings = {"first_candidate": first_candidate, "num_candidates": num_candidates}
    config = PruneConfig(num_removed_layers=num_removed, **settings)
    try:
        check_removable(6, config)
    except ExportError as error:
        numbers = rf"num_removed_layers {num_removed} .* {max(5 - first_candidate, 0)} first cand"
        assert re.match(numbers, str(error))
        settings["progress"] = lambda *_: pytest.fail("work was done")  # type: ignore[assignment]
        with pytest.raises(ExportError, match=str(error)):
            rank(teacher, num_removed, **settings)
    else:
        assert len(rank(teacher, num_removed, **settings)) == num_removed


# --- the student


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "qwen2", "smollm3-window"])
def test_drop_layers_gives_the_kept_layers_and_all_else(architecture: str) -> None:
    teacher = random_model(architecture, num_layers=5)
    student, kept = drop_layers(teacher, [0, 3, 4]), {0: 0, 1: 3, 2: 4}
    weights = teacher.state_dict()
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        assert value.equal(weights[".".join(parts)]), name
    is_tied = student.lm_head.weight is student.model.embed_tokens.weight
    assert is_tied == (architecture != "smollm3-window" and "untied" not in architecture)
    assert student.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    for key in ("layer_types", "no_rope_layers"):
        before = getattr(teacher.config, key, None)
        assert before is None or getattr(student.config, key) == [before[i] for i in (0, 3, 4)]


@pytest.mark.parametrize(
    "prune",
    [
        lambda teacher: rank(teacher, 2) and None,
        lambda teacher: drop_layers(teacher, [0, 2, 5]),
        lambda teacher: shrink_mlp(teacher, rank_channels(teacher, TEXTS), kept_share=0.5),
    ],
    ids=["rank", "drop", "shrink"],
)
def test_pruning_leaves_the_teacher_as_it_was(teacher: Any, prune: Callable[[Any], Any]) -> None:
    layers, before, config = list(teacher.model.layers), logits(teacher), str(teacher.config)
    student = prune(teacher)
    for parameter in student.parameters() if student else ():
        parameter.data.zero_()
    assert logits(teacher).equal(before) and str(teacher.config) == config
    assert all(a is b for a, b in zip(teacher.model.layers, layers, strict=True))
    assert [layer.self_attn.layer_idx for layer in teacher.model.layers] == list(range(6))


def test_drop_layers_of_idle_layers_gives_the_teacher(teacher: Any) -> None:
    for layer in (1, 4):
        silence(teacher, layer)
    torch.testing.assert_close(logits(drop_layers(teacher, [0, 2, 3, 5])), logits(teacher))


# --- MLP channels


def test_rank_channels_is_by_mean_size_times_the_norm_of_the_column(teacher: Any) -> None:
    importances = rank_channels(teacher, TEXTS)
    assert [tuple(i.shape) for i in importances] == [(64,)] * 6
    seen: list[torch.Tensor] = []
    mlp = teacher.model.layers[2].mlp
    for text in TEXTS:
        ids = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
        with torch.inference_mode():
            positions = torch.arange(ids.shape[1])[None]
            layers = teacher.model(ids, output_hidden_states=True, use_cache=False)
            block = teacher.model.layers[2]
            hidden = layers.hidden_states[2]
            attended = (
                hidden
                + block.self_attn(
                    block.input_layernorm(hidden),
                    position_embeddings=teacher.model.rotary_emb(hidden, positions),
                    attention_mask=None,
                )[0]
            )
            x = block.post_attention_layernorm(attended)
            product = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        seen.append(product[0, len(text.prompt_token_ids) - 1 : -1])
    expected = torch.cat(seen).abs().mean(0) * mlp.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(importances[2], expected.detach())


def test_shrink_mlp_of_idle_channels_gives_the_teacher(teacher: Any) -> None:
    idle = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32] for i in range(6)]
    for index, (layer, channels) in enumerate(zip(teacher.model.layers, idle, strict=True)):
        if index % 2:
            layer.mlp.down_proj.weight.data[:, channels] = 0
        else:
            layer.mlp.up_proj.weight.data[channels] = 0
    student = shrink_mlp(teacher, rank_channels(teacher, TEXTS), kept_share=0.5)
    assert student.config.intermediate_size == 32
    torch.testing.assert_close(logits(student), logits(teacher))


def test_shrink_mlp_cuts_biases_with_their_channels() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, mlp_bias=True,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    for layer in teacher.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.bias)
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    student = shrink_mlp(teacher, rank_channels(teacher, TEXTS), kept_share=0.5)
    assert student.model.layers[0].mlp.up_proj.bias.shape == (32,)
    torch.testing.assert_close(logits(student), logits(teacher))


@pytest.mark.parametrize("architecture", ["llama", "qwen2-untied"])
def test_student_without_layers_and_channels_is_trained_saved_and_loaded_like_any_other(
    tmp_path: Path, architecture: str
) -> None:
    teacher = random_model(architecture)
    shallow = drop_layers(teacher, [0, 2, 4])
    student = shrink_mlp(shallow, rank_channels(shallow, TEXTS), kept_share=0.5)
    student(INPUT_IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(student))
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (3, 32)


@pytest.mark.parametrize(
    ("width", "share", "expected"),
    [(64, 0.5, 32), (64, 0.1, 32), (1536, 0.5, 768), (1536, 0.51, 768), (1536, 0.99, 1536),
     (100, 0.99, 96), (100, 1.0, 100), (24, 0.5, 24)],
)  # fmt: skip
def test_kept_mlp_width_is_a_multiple_of_32_within_the_teachers(
    width: int, share: float, expected: int
) -> None:
    assert kept_mlp_width(width, share) == expected
