"""What each variant costs in quality: exact KL and argmax agreement on held-out answers.

Every model runs in the engine that serves it and scores the teacher's own completions of the test
prompts, so the numbers are of the path that users get. KL is over the full vocabulary, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from export.distill import Example
from export.losses import exact_logprobs, forward_kl_of_logprobs
from serve.backend import Backend
from serve.engine import Engine
from serve.scoring import MAX_PATH_NOISE_NATS, ScoringRequest, measure_path_noise


@dataclass(frozen=True, slots=True)
class Agreement:
    """A model against a reference, over completion tokens: `forward_kl` is KL(reference ‖ model)
    in nats per token; `argmax_agreement` the share of positions with the same likeliest token."""

    forward_kl: float
    argmax_agreement: float
    num_tokens: int


def evaluate(
    backends: Mapping[str, Backend],
    references: Sequence[str],
    examples: Sequence[Example],
    progress: Callable[[int, int], None],
) -> dict[tuple[str, str], Agreement]:
    """Return the agreement of every model with every other one named in `references`.

    Keys are (reference, model). Prompts go one batch at a time, so that the logits of all models
    for one batch are all that is kept.
    """
    engines = {name: _engine(name, backend) for name, backend in backends.items()}
    totals = {
        (reference, name): _Totals() for reference in references for name in backends
        if name != reference
    }  # fmt: skip
    batch_size = min(backend.info.max_num_seqs for backend in backends.values())
    done = 0
    for batch in _batches(examples, batch_size):
        logits = [_logits(engine, batch) for engine in engines.values()]
        for of_one_prompt in zip(*logits, strict=True):
            logprobs = dict(zip(engines, map(exact_logprobs, of_one_prompt), strict=True))
            for (reference, name), total in totals.items():
                total.add(logprobs[reference], logprobs[name])
        done += len(batch)
        progress(done, len(examples))
    return {pair: total.agreement() for pair, total in totals.items()}


def _engine(name: str, backend: Backend) -> Engine:
    return Engine(
        backend,
        eos_token_ids=frozenset(),
        name=name,
        scores_in_one_pass=measure_path_noise(backend) <= MAX_PATH_NOISE_NATS,
    )


def _logits(engine: Engine, batch: Sequence[Example]) -> list[torch.Tensor]:
    """Return the raw logits `(T, V)` of each example's completion positions."""
    futures = [
        engine.score(
            ScoringRequest(
                request_id=str(index),
                prompt_token_ids=example.prompt_token_ids,
                completions=(example.completion_token_ids,),
                with_logits=True,
            )
        )
        for index, example in enumerate(batch)
    ]
    for _ in engine.run():
        pass
    logits = []
    for future in futures:
        (scored,) = future.result()
        assert scored.logits is not None, "asked for with_logits"
        logits.append(torch.from_numpy(scored.logits))
    return logits


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


class _Totals:
    def __init__(self) -> None:
        self._kl = 0.0
        self._num_agreeing = 0
        self._num_tokens = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        self._kl += float(forward_kl_of_logprobs(actual, expected).sum())
        self._num_agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        self._num_tokens += len(expected)

    def agreement(self) -> Agreement:
        count = self._num_tokens
        return Agreement(self._kl / count, self._num_agreeing / count, count)
