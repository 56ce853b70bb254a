"""What does not fit into the context or the queue is refused before it gets there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protos.tandem.v1 import inference_pb2 as pb
from serve.errors import (
    CompletionLengthError,
    ContextLengthError,
    InvalidFieldError,
    NeverFitsError,
)
from serve.pair.admission import (
    check_capacity,
    check_known,
    fit_context,
    tokenize,
    tokenize_completions,
)
from serve.pair.request import Limits, Prompt
from serve.rpc.validation import validate_generate, validate_score
from serve.text.tokenizer import Tokenizer

LIMITS = Limits(max_model_len=100, vocab_size=50, max_queued_samples=5)


def test_prompt_ids_are_used_as_they_are(tokenizer: Tokenizer) -> None:
    assert tokenize(Prompt(token_ids=(7, 8)), tokenizer) == (7, 8)


def test_template_that_renders_nothing_is_refused(make_tokenizer: type[Tokenizer]) -> None:
    with pytest.raises(InvalidFieldError, match="messages: has no tokens"):
        tokenize(Prompt(messages=(("user", ""),)), make_tokenizer(""))


def fitted(num_prompt_tokens: int, others: tuple[int, ...] = (), **sampling: int) -> int:
    """Return the max_tokens of a request of so many prompt tokens."""
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(**sampling))
    spec = validate_generate(request, LIMITS)
    return fit_context(spec, num_prompt_tokens, LIMITS, others).sampling.max_tokens


def test_prompt_and_max_tokens_may_fill_the_context_exactly() -> None:
    assert fitted(60, max_tokens=40) == 40
    text = "60 prompt tokens [+] max_tokens 41 = 101 exceed the context of 100 tokens"
    with pytest.raises(ContextLengthError, match=text) as caught:
        fitted(60, max_tokens=41)
    assert caught.value.field == "sampling.max_tokens"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "others", "min_tokens", "max_tokens"),
    [
        (10, (), 0, 90),  # of 128
        (99, (), 0, 1),
        (60, (), 40, 40),
        (10, (50,), 0, 40),  # a remote model has a shorter context
        (10, (1000,), 0, 90),
        (10, (10, 0), 0, 90),  # the prompt does not fit there; nothing is known of it
        (10, (50,), 41, 41),  # nor do min_tokens
    ],
)
def test_default_max_tokens_is_what_the_prompt_leaves(
    num_prompt_tokens: int, others: tuple[int, ...], min_tokens: int, max_tokens: int
) -> None:
    assert fitted(num_prompt_tokens, others, min_tokens=min_tokens) == max_tokens


@pytest.mark.parametrize(
    ("num_prompt_tokens", "sampling", "field", "text"),
    [
        (100, {}, "prompt", "100 prompt tokens leave no room for a completion in the context"),
        (100, {"max_tokens": 1}, "prompt", "leave no room for a completion"),
        (60, {"min_tokens": 41}, "sampling.min_tokens", "[+] min_tokens 41 = 101 exceed"),
    ],
)
def test_what_leaves_no_room_is_named(
    num_prompt_tokens: int, sampling: dict[str, int], field: str, text: str
) -> None:
    with pytest.raises(ContextLengthError, match=text) as caught:
        fitted(num_prompt_tokens, **sampling)
    assert caught.value.field == field


def test_completion_over_the_context_names_its_place(make_pair: Any) -> None:
    completions = [pb.Completion(text="a"), pb.Completion(text="a" * 41)]
    spec = validate_score(pb.ScoreRequest(prompt="x", completions=completions), LIMITS)
    with pytest.raises(CompletionLengthError) as caught:
        tokenize_completions(spec, 60, make_pair().engines.student, LIMITS)
    assert caught.value.field == "completions[1]"


def test_text_with_a_token_that_the_model_has_no_row_for_is_refused(make_pair: Any) -> None:
    student = make_pair(student=torch.zeros(100, 100)).engines.student
    check_known("prompt", student.tokenizer.encode("!"), student)
    with pytest.raises(
        InvalidFieldError, match=r"prompt: has the token .* the id 130; .* below 100"
    ):
        check_known("prompt", student.tokenizer.encode("é"), student)


def test_samples_may_fill_the_queue_exactly() -> None:
    check_capacity(5, LIMITS)
    with pytest.raises(NeverFitsError, match="num_samples 6 exceeds the 5"):
        check_capacity(6, LIMITS)
