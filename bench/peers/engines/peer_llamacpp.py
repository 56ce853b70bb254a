"""llama.cpp through the C interface of llama-cpp-python: one batch of sequences, greedy sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PACKAGES = ("llama-cpp-python",)


class LlamaCppRunner:
    """See `bench.peers.worker.PeerModel`. `lc` is the module `llama_cpp`."""

    def __init__(self, lc: Any, model: Any, context: Any, max_batch_tokens: int) -> None:
        self._lc = lc
        self._model = model
        self._context = context
        self._batch = lc.llama_batch_init(max_batch_tokens, 0, 1)
        self._greedy = lc.llama_sampler_init_greedy()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        self._lc.llama_memory_clear(self._lc.llama_get_memory(self._context), False)
        ends = self._decode([(list(prompt), 0) for prompt in prompts], num_logits=1)
        completions: list[list[int]] = [[] for _ in prompts]
        position = len(prompts[0])
        while True:
            for completion, end in zip(completions, ends, strict=True):
                completion.append(self._lc.llama_sampler_sample(self._greedy, self._context, end))
            if len(completions[0]) == max_tokens:
                return completions
            ends = self._decode([(c[-1:], position) for c in completions], num_logits=1)
            position += 1

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        self._lc.llama_memory_clear(self._lc.llama_get_memory(self._context), False)
        self._decode([(list(token_ids), 0)], num_logits=num_rows + 1)
        vocab_size = self._lc.llama_vocab_n_tokens(self._lc.llama_model_get_vocab(self._model))
        rows = range(len(token_ids) - num_rows - 1, len(token_ids) - 1)
        return np.stack(
            [
                np.ctypeslib.as_array(
                    self._lc.llama_get_logits_ith(self._context, row), shape=(vocab_size,)
                ).copy()
                for row in rows
            ]
        )

    def _decode(self, sequences: Sequence[tuple[list[int], int]], num_logits: int) -> list[int]:
        """Run new tokens of each sequence, behind `position` cached ones.

        The last `num_logits` tokens of each get logits; returns where in the batch each ends.
        """
        batch, index, ends = self._batch, 0, []
        for sequence_id, (token_ids, position) in enumerate(sequences):
            for offset, token_id in enumerate(token_ids):
                batch.token[index] = token_id
                batch.pos[index] = position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence_id
                batch.logits[index] = offset >= len(token_ids) - num_logits
                index += 1
            ends.append(index - 1)
        batch.n_tokens = index
        if status := self._lc.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return ends


def load(options: dict[str, Any]) -> LlamaCppRunner:
    """Options: `path` of the GGUF file, `num_threads`, `max_num_seqs`, `max_model_len`."""
    import llama_cpp as lc  # type: ignore[import-not-found]

    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(options["path"].encode(), lc.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {options['path']}")
    num_tokens = options["max_num_seqs"] * options["max_model_len"]
    params = lc.llama_context_default_params()
    params.n_ctx = num_tokens
    params.n_seq_max = options["max_num_seqs"]
    params.n_batch = params.n_ubatch = 2048
    params.n_threads = params.n_threads_batch = options["num_threads"]
    context = lc.llama_init_from_model(model, params)
    print(lc.llama_print_system_info().decode())
    return LlamaCppRunner(lc, model, context, params.n_batch)
