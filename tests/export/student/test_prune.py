from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from export.run.errors import ExportError
from export.run.settings import PruneConfig
from export.student.losses import exact_forward_kl
from export.student.prune import (
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


@pytest.fixture(scope="session")
def texts() -> list[Example]:
    return random_examples([(4, 6), (5, 9)])


@pytest.fixture
def teacher() -> Any:
    return random_model("llama", num_layers=6)


def silence(model: Any, layer: int) -> None:
    """Make a layer add nothing to the hidden states."""
    block = model.model.layers[layer]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()


def rank(teacher: Any, texts: list[Example], num_removed: int, **changes: Any) -> list[int]:
    settings = {"first_candidate": 1, "num_candidates": 6} | changes
    return [r.layer for r in rank_layers(teacher, texts, num_removed, **settings)]


@torch.inference_mode()
def completion_logits(text: Example, *models: Any) -> list[torch.Tensor]:
    ids = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
    start = len(text.prompt_token_ids) - 1
    return [model(ids).logits[0, start:-1] for model in models]


def cost(teacher: Any, texts: list[Example], kept: list[int]) -> float:
    """KL(teacher ‖ teacher with the layers `kept`), per token."""
    student = drop_layers(teacher, kept)
    kls = [exact_forward_kl(*completion_logits(text, student, teacher)) for text in texts]
    return float(torch.cat(kls).mean())


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(INPUT_IDS).logits[0]


# --- which layers go


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_layer_that_does_nothing_goes_first(teacher: Any, texts: list[Example], layer: int) -> None:
    silence(teacher, layer)
    first, second = rank_layers(teacher, texts, 2, first_candidate=1, num_candidates=6)
    assert (first.layer, first.kl) == (layer, 0.0)
    assert second.kl > 0.01


def test_kl_is_of_the_completion_positions_with_all_removed_layers_gone(
    teacher: Any, texts: list[Example]
) -> None:
    kept = list(range(6))
    for removal in rank_layers(teacher, texts, 2, first_candidate=1, num_candidates=6):
        kept.remove(removal.layer)
        assert removal.kl == pytest.approx(cost(teacher, texts, kept), rel=1e-4)


def test_rows_without_tokens_have_no_say(teacher: Any, texts: list[Example]) -> None:
    settings = {"first_candidate": 1, "num_candidates": 6, "real_tokens": RealTokens(60, (7,))}
    quiet = rank_layers(teacher, texts, 2, **settings)
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.clone())
    teacher.lm_head.weight.data[[7, *range(60, 97)]] *= 20
    assert rank_layers(teacher, texts, 2, **settings) == quiet
    assert rank_layers(teacher, texts, 2, first_candidate=1, num_candidates=6) != quiet


def test_the_cheapest_layer_goes_in_every_round(teacher: Any, texts: list[Example]) -> None:
    kept = list(range(6))
    for removed in rank(teacher, texts, 2):
        costs = {
            layer: cost(teacher, texts, [i for i in kept if i != layer]) for layer in kept[1:-1]
        }
        assert removed == min(costs, key=costs.__getitem__)
        kept.remove(removed)


@pytest.mark.parametrize("first_candidate", [0, 2, 4])
def test_layers_below_the_first_candidate_and_the_last_one_stay(
    teacher: Any, texts: list[Example], first_candidate: int
) -> None:
    for layer in (1, 5):
        silence(teacher, layer)
    num_removed = min(3, 5 - first_candidate)
    removed = rank(teacher, texts, num_removed, first_candidate=first_candidate)
    assert len(set(removed)) == num_removed
    assert all(first_candidate <= layer < 5 for layer in removed)


def test_nothing_to_remove_removes_nothing(teacher: Any, texts: list[Example]) -> None:
    assert rank(teacher, texts, 0) == []


@pytest.mark.parametrize(
    ("num_removed", "num_candidates", "expected"),
    [(1, 6, [4]), (3, 6, [4, 3, 2]), (2, 2, [4, 2]), (2, 9, [4, 3])],
)
def test_progress_ends_at_its_total(
    teacher: Any, texts: list[Example], num_removed: int, num_candidates: int, expected: list[int]
) -> None:
    shown: list[tuple[int, int]] = []
    rank_layers(
        teacher, texts, num_removed,
        first_candidate=1, num_candidates=num_candidates,
        progress=lambda done, total: shown.append((done, total)),
    )  # fmt: skip
    assert shown == [(done, sum(expected)) for done in range(1, sum(expected) + 1)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_removed": 5},
        {"num_removed": 3, "first_candidate": 3},
        {"num_removed": 3, "num_candidates": 1},
        {"num_removed": 1, "first_candidate": 5},
    ],
)
def test_removing_more_layers_than_there_are_candidates_fails_before_any_work(
    teacher: Any, texts: list[Example], settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.student.prune.forward_kl", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ExportError, match=r"num_removed_layers.*candidates"):
        rank(teacher, texts, settings.pop("num_removed"), **settings)


@pytest.mark.parametrize("num_removed", [0, 1, 2, 5])
@pytest.mark.parametrize(("first_candidate", "num_candidates"), [(1, 6), (1, 2), (9, 1)])
def test_check_before_any_sampling_tells_what_ranking_would(
    teacher: Any, texts: list[Example], num_removed: int, first_candidate: int, num_candidates: int
) -> None:
    settings = {"first_candidate": first_candidate, "num_candidates": num_candidates}
    config = PruneConfig(num_removed_layers=num_removed, **settings)
    try:
        check_removable(6, config)
    except ExportError as error:
        with pytest.raises(ExportError, match=str(error)):
            rank(teacher, texts[:1], num_removed, **settings)
    else:
        assert len(rank(teacher, texts[:1], num_removed, **settings)) == num_removed


def test_more_layers_than_can_go_are_refused_with_the_numbers() -> None:
    check_removable(6, PruneConfig(num_removed_layers=4))
    with pytest.raises(ExportError, match=r"num_removed_layers 5 is more than 4 first candidates"):
        check_removable(6, PruneConfig(num_removed_layers=5))


def test_ranking_leaves_the_teacher_as_it_was(teacher: Any, texts: list[Example]) -> None:
    layers, before = list(teacher.model.layers), logits(teacher)
    rank(teacher, texts, 2)
    assert all(a is b for a, b in zip(teacher.model.layers, layers, strict=True))
    assert logits(teacher).equal(before)


# --- the student


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "qwen2"])
def test_student_has_the_kept_layers_and_all_else(architecture: str) -> None:
    teacher = random_model(architecture, num_layers=5)
    student, kept = drop_layers(teacher, [0, 3, 4]), {0: 0, 1: 3, 2: 4}
    weights = teacher.state_dict()
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        assert value.equal(weights[".".join(parts)]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_student_config_and_layer_indices_fit_its_layers(architecture: str) -> None:
    student = drop_layers(random_model(architecture, num_layers=5), [0, 3, 4])
    assert student.config.num_hidden_layers == 3
    assert len(getattr(student.config, "layer_types", None) or [None] * 3) == 3
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]


def test_dropping_layers_leaves_the_teacher_as_it_was(teacher: Any) -> None:
    before = logits(teacher)
    student = drop_layers(teacher, [0, 2, 5])
    for parameter in student.parameters():
        parameter.data.zero_()
    assert logits(teacher).equal(before)
    assert teacher.config.num_hidden_layers == 6
    assert [layer.self_attn.layer_idx for layer in teacher.model.layers] == list(range(6))


def test_tied_embedding_stays_tied(teacher: Any) -> None:
    student = drop_layers(teacher, [0, 5])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_student_without_the_layers_that_do_nothing_is_the_teacher(teacher: Any) -> None:
    for layer in (1, 4):
        silence(teacher, layer)
    torch.testing.assert_close(logits(drop_layers(teacher, [0, 2, 3, 5])), logits(teacher))


def test_student_decodes_with_its_cache(teacher: Any) -> None:
    student = drop_layers(teacher, [0, 2, 5])
    tokens = student.generate(INPUT_IDS, do_sample=False, max_new_tokens=6, use_cache=True)
    uncached = student.generate(INPUT_IDS, do_sample=False, max_new_tokens=6, use_cache=False)
    assert tokens.tolist() == uncached.tolist()


# --- MLP channels


def test_importance_of_a_channel_is_its_mean_size_times_the_norm_of_its_column(
    teacher: Any, texts: list[Example]
) -> None:
    importances = rank_channels(teacher, texts)
    assert [tuple(i.shape) for i in importances] == [(64,)] * 6
    seen: list[torch.Tensor] = []
    mlp = teacher.model.layers[2].mlp
    for text in texts:
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


def test_channels_that_do_nothing_go_first_and_the_student_is_the_teacher(
    teacher: Any, texts: list[Example]
) -> None:
    idle = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32] for i in range(6)]
    for index, (layer, channels) in enumerate(zip(teacher.model.layers, idle, strict=True)):
        if index % 2:
            layer.mlp.down_proj.weight.data[:, channels] = 0
        else:
            layer.mlp.up_proj.weight.data[channels] = 0
    student = shrink_mlp(teacher, rank_channels(teacher, texts), kept_share=0.5)
    assert student.config.intermediate_size == 32
    torch.testing.assert_close(logits(student), logits(teacher))


def test_ranking_channels_leaves_no_hook(teacher: Any, texts: list[Example]) -> None:
    rank_channels(teacher, texts)
    assert all(not layer.mlp.down_proj._forward_pre_hooks for layer in teacher.model.layers)


def test_shrinking_leaves_the_teacher_as_it_was(teacher: Any, texts: list[Example]) -> None:
    before = logits(teacher)
    student = shrink_mlp(teacher, rank_channels(teacher, texts), kept_share=0.5)
    for parameter in student.parameters():
        parameter.data.zero_()
    assert logits(teacher).equal(before)
    assert teacher.config.intermediate_size == 64


def test_biases_are_cut_with_their_channels(texts: list[Example]) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, mlp_bias=True,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    for layer in teacher.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.bias)
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    student = shrink_mlp(teacher, rank_channels(teacher, texts), kept_share=0.5)
    assert student.model.layers[0].mlp.up_proj.bias.shape == (32,)
    torch.testing.assert_close(logits(student), logits(teacher))


@pytest.mark.parametrize("architecture", ["llama", "qwen2-untied"])
def test_narrow_student_is_saved_trained_and_loaded_like_any_other(
    texts: list[Example], tmp_path: Path, architecture: str
) -> None:
    teacher = random_model(architecture)
    student = shrink_mlp(teacher, rank_channels(teacher, texts), kept_share=0.5)
    student(INPUT_IDS).logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(student))
    assert loaded.num_parameters() < teacher.num_parameters()


def test_layers_and_channels_can_both_go(teacher: Any, texts: list[Example]) -> None:
    shallow = drop_layers(teacher, [0, 2, 5])
    student = shrink_mlp(shallow, rank_channels(shallow, texts), kept_share=0.5)
    assert logits(student).isfinite().all()
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (3, 32)


@pytest.mark.parametrize(
    ("width", "share", "expected"),
    [(64, 0.5, 32), (64, 0.1, 32), (1536, 0.5, 768), (1536, 0.51, 768), (1536, 0.99, 1536),
     (100, 0.99, 96), (100, 1.0, 100), (24, 0.5, 24)],
)  # fmt: skip
def test_kept_width_is_a_multiple_of_32_within_the_teachers(
    width: int, share: float, expected: int
) -> None:
    assert kept_mlp_width(width, share) == expected
