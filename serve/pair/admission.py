"""Whether a checked request fits: its tokens into the context, its samples into the queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from serve.errors import (
    CompletionLengthError,
    ContextLengthError,
    InvalidFieldError,
    NeverFitsError,
)
from serve.pair.request import GenerationSpec, Limits, Prompt, ScoreSpec
from serve.pair.served import ServedModel
from serve.text.tokenizer import Tokenizer


def tokenize(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt's token ids, at least one.

    Raises:
        InvalidFieldError: the text has no tokens, or the chat template refuses the messages.
    """
    if prompt.token_ids:
        return prompt.token_ids
    if prompt.messages:
        token_ids = tokenizer.encode_chat(
            prompt.messages, continue_final_message=prompt.continue_final_message
        )
    else:
        token_ids = tokenizer.encode(prompt.text)
    if not token_ids:
        raise InvalidFieldError.of(prompt.field, "has no tokens; must have at least one")
    return token_ids


def check_known(field: str, token_ids: Sequence[int], model: ServedModel) -> None:
    """Check the tokens of a text: a tokenizer may have more of them than its model has rows for.

    A remote model's ids are checked by its own server.

    Raises:
        InvalidFieldError: the model has no row for one, and its step would fail for everyone.
    """
    largest, num_rows = max(token_ids), model.engine.info.vocab_size
    if not model.address and largest >= num_rows:
        raise InvalidFieldError.of(
            field,
            f"has the token {model.tokenizer.token_text(largest)!r} with the id {largest}; the "
            f"{model.role.value} knows tokens with ids below {num_rows} alone",
        )


def fit_context(
    spec: GenerationSpec, num_prompt_tokens: int, limits: Limits, others: Iterable[int] = ()
) -> GenerationSpec:
    """Return the request with a default `max_tokens` lowered to what the prompt leaves.

    `others` are the contexts of remote models. They count as far as the prompt fits into them; a
    prompt that does not is refused by their own server.

    Raises:
        ContextLengthError: the prompt leaves no room for one token, or for those asked for.
    """
    context, sampling = limits.max_model_len, spec.sampling
    if num_prompt_tokens >= context:
        what = f"{num_prompt_tokens} prompt tokens leave no room for a completion in"
        raise ContextLengthError(spec.prompt.field, what, context)
    name, num_asked = "max_tokens", sampling.max_tokens
    if spec.is_max_tokens_default:
        name, num_asked = "min_tokens", max(sampling.min_tokens, 1)
    if num_prompt_tokens + num_asked > context:
        total = num_prompt_tokens + num_asked
        what = f"{num_prompt_tokens} prompt tokens + {name} {num_asked} = {total} exceed"
        raise ContextLengthError(f"sampling.{name}", what, context)
    if not spec.is_max_tokens_default:
        return spec
    left = min(each for each in (context, *others) if each > num_prompt_tokens) - num_prompt_tokens
    max_tokens = max(num_asked, min(sampling.max_tokens, left))
    return replace(spec, sampling=replace(sampling, max_tokens=max_tokens))


def check_capacity(num_samples: int, limits: Limits) -> None:
    """Raise NeverFitsError when even an idle server could not take all samples."""
    if num_samples > limits.max_queued_samples:
        raise NeverFitsError(num_samples, limits.max_queued_samples)


def tokenize_completions(
    spec: ScoreSpec, num_prompt_tokens: int, model: ServedModel, limits: Limits
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of the completions to score, each at least one.

    Raises:
        InvalidFieldError: a text has no tokens, or one that the model does not have.
        CompletionLengthError: prompt and completion exceed the context.
    """
    completions = []
    for index, completion in enumerate(spec.completions):
        if isinstance(completion, str):
            completion = model.tokenizer.encode(completion, is_continuation=True)
        if not completion:
            raise InvalidFieldError.of(
                f"completions[{index}].text", "has no tokens; must have at least one"
            )
        check_known(f"completions[{index}].text", completion, model)
        num_tokens = num_prompt_tokens + len(completion)
        if num_tokens > limits.max_model_len:
            raise CompletionLengthError(index, num_tokens, limits.max_model_len)
        completions.append(completion)
    return tuple(completions)
