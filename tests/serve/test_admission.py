"""What does not fit into the context or the queue is refused before it gets there."""

from __future__ import annotations

import pytest

from protos.tandem.v1 import inference_pb2 as pb
from serve.admission import check_capacity, check_context, tokenize, tokenize_completions
from serve.errors import (
    CompletionLengthError,
    ContextLengthError,
    InvalidFieldError,
    NeverFitsError,
)
from serve.specs import Limits, Prompt
from serve.tokenization import Tokenizer
from serve.validation import validate_score

LIMITS = Limits(max_model_len=100, vocab_size=50, max_queued_samples=5)


def test_prompt_ids_are_used_as_they_are(tokenizer: Tokenizer) -> None:
    assert tokenize(Prompt(token_ids=(7, 8)), tokenizer) == (7, 8)


def test_template_that_renders_nothing_is_refused(make_tokenizer: type[Tokenizer]) -> None:
    with pytest.raises(InvalidFieldError, match="messages: has no tokens"):
        tokenize(Prompt(messages=(("user", ""),)), make_tokenizer(""))


def test_prompt_and_max_tokens_may_fill_the_context_exactly() -> None:
    check_context(60, 40, LIMITS)
    with pytest.raises(ContextLengthError, match="60 prompt tokens"):
        check_context(60, 41, LIMITS)


def test_completion_over_the_context_names_its_place(tokenizer: Tokenizer) -> None:
    completions = [pb.Completion(text="a"), pb.Completion(text="a" * 41)]
    spec = validate_score(pb.ScoreRequest(prompt="x", completions=completions), LIMITS)
    with pytest.raises(CompletionLengthError) as caught:
        tokenize_completions(spec, 60, tokenizer, LIMITS)
    assert caught.value.field == "completions[1]"


def test_samples_may_fill_the_queue_exactly() -> None:
    check_capacity(5, LIMITS)
    with pytest.raises(NeverFitsError, match="num_samples 6 exceeds the 5"):
        check_capacity(6, LIMITS)
