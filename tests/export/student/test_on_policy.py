from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from export.student.on_policy import COLLAPSE_SHARE, AnswerSettings, answer, repetition
from export.teacher.examples import Example
from serve.text.real_tokens import RealTokens
from tests.support.random_models import random_model

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (20, 21)]
NO_EOS: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def student() -> Any:
    return random_model(num_layers=2)


def test_answer_is_greedy_by_the_students_own_logits(student: Any) -> None:
    answers = answer(student, PROMPTS, AnswerSettings(0.0, 6, 3, NO_EOS))
    assert [e.prompt_token_ids for e in answers] == PROMPTS
    rounded = copy.deepcopy(student).to(torch.bfloat16)
    for example in answers:
        assert len(example.completion_token_ids) == 6
        input_ids = torch.tensor([example.prompt_token_ids + example.completion_token_ids])
        with torch.inference_mode():
            logits = rounded(input_ids).logits[0, len(example.prompt_token_ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(example.completion_token_ids)[:, None])[:, 0]
        # bfloat16 has 8 bits: whichever is chosen is the largest up to its rounding.
        assert (chosen >= logits.amax(-1) - 2**-6 * logits.abs().amax(-1)).all()


def test_answer_ends_with_the_eos_token(student: Any) -> None:
    (free,) = answer(student, PROMPTS[:1], AnswerSettings(0.0, 8, 1, NO_EOS))
    eos = free.completion_token_ids[2]
    (ended,) = answer(student, PROMPTS[:1], AnswerSettings(0.0, 8, 1, frozenset({eos})))
    stop = free.completion_token_ids.index(eos)
    assert ended.completion_token_ids == free.completion_token_ids[: stop + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_holds_real_tokens_alone(student: Any, temperature: float) -> None:
    loud = copy.deepcopy(student)
    with torch.no_grad():
        loud.lm_head.weight[60:] *= 20
    settings = AnswerSettings(temperature, 6, 3, NO_EOS)
    drawn = [t for e in answer(loud, PROMPTS, settings) for t in e.completion_token_ids]
    assert max(drawn) >= 60, "nothing would be shown"
    answers = answer(loud, PROMPTS, settings, RealTokens(60))
    assert max(t for e in answers for t in e.completion_token_ids) < 60


def test_answer_follows_from_the_seed_whatever_is_answered_beside(student: Any) -> None:
    def sample(seed: int, max_num_seqs: int = 2) -> list[Example]:
        return answer(student, PROMPTS, AnswerSettings(1.0, 6, max_num_seqs, NO_EOS, seed))

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first
    # Prompt i has seed + i.
    assert answer(student, PROMPTS[1:2], AnswerSettings(1.0, 6, 1, NO_EOS, 8)) == first[1:2]


def test_answer_leaves_the_student_and_the_random_generator_alone(student: Any) -> None:
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    state, config = torch.get_rng_state(), str(student.config)
    student = copy.deepcopy(student)
    student.set_attn_implementation("eager")
    answer(student, PROMPTS, AnswerSettings(1.0, 4, 4, NO_EOS))
    assert torch.get_rng_state().equal(state)
    assert student.dtype == torch.float32 and str(student.config) == config
    assert student(torch.tensor([[1]]), output_attentions=True).attentions, "still eager"
    assert all(value.equal(weights[name]) for name, value in student.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())


def test_repetition_is_the_mean_share_of_repeated_4_grams() -> None:
    varied, loop = Example((1,), tuple(range(8))), Example((1,), (5,) * 8)
    half = Example((1,), (1, 2, 3, 4, 1, 2, 3, 4, 1))  # 6 4-grams, 4 different ones
    assert repetition([varied]) == 0
    assert repetition([loop]) == pytest.approx(0.8)
    assert repetition([varied, loop, half]) == pytest.approx((0 + 0.8 + 2 / 6) / 3)
    assert repetition([varied]) < COLLAPSE_SHARE < repetition([loop])
