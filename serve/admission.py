"""Whether a checked request fits: its tokens into the context, its samples into the queue."""

from __future__ import annotations

from serve.errors import (
    CompletionLengthError,
    ContextLengthError,
    InvalidFieldError,
    NeverFitsError,
)
from serve.specs import Limits, Prompt, ScoreSpec
from serve.tokenization import Tokenizer


def tokenize(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt's token ids, at least one.

    Raises:
        InvalidFieldError: the text has no tokens, or the chat template refuses the messages.
    """
    if prompt.token_ids:
        return prompt.token_ids
    token_ids = (
        tokenizer.encode_chat(prompt.messages) if prompt.messages else tokenizer.encode(prompt.text)
    )
    if not token_ids:
        raise InvalidFieldError.of(
            "messages" if prompt.messages else "prompt", "has no tokens; must have at least one"
        )
    return token_ids


def check_context(num_prompt_tokens: int, max_tokens: int, limits: Limits) -> None:
    """Raise ContextLengthError unless the prompt and its completions fit into the context."""
    if num_prompt_tokens + max_tokens > limits.max_model_len:
        raise ContextLengthError(num_prompt_tokens, max_tokens, limits.max_model_len)


def check_capacity(num_samples: int, limits: Limits) -> None:
    """Raise NeverFitsError when even an idle server could not take all samples."""
    if num_samples > limits.max_queued_samples:
        raise NeverFitsError(num_samples, limits.max_queued_samples)


def tokenize_completions(
    spec: ScoreSpec, num_prompt_tokens: int, tokenizer: Tokenizer, limits: Limits
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of the completions to score, each at least one.

    Raises:
        InvalidFieldError: a text has no tokens.
        CompletionLengthError: prompt and completion exceed the context.
    """
    completions = []
    for index, completion in enumerate(spec.completions):
        if isinstance(completion, str):
            completion = tokenizer.encode(completion, is_continuation=True)
        if not completion:
            raise InvalidFieldError.of(
                f"completions[{index}].text", "has no tokens; must have at least one"
            )
        num_tokens = num_prompt_tokens + len(completion)
        if num_tokens > limits.max_model_len:
            raise CompletionLengthError(index, num_tokens, limits.max_model_len)
        completions.append(completion)
    return tuple(completions)
