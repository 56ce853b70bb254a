"""onnxruntime-genai's `Generator` on a graph of the bundle, with its own `genai_config.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

PACKAGES = ("onnxruntime-genai", "onnxruntime")


class GenaiRunner:
    """See `bench.peers.worker.PeerModel`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Any]:
        import onnxruntime_genai as og  # type: ignore[import-not-found]

        length = len(prompts[0]) + max_tokens
        params = og.GeneratorParams(self._model)
        # The minimum keeps EOS from ending a sequence; the lengths count the prompt.
        params.set_search_options(
            batch_size=len(prompts), min_length=length, max_length=length, do_sample=False
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(i)[-max_tokens:] for i in range(len(prompts))]

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        raise NotImplementedError("the graph is Tandem's: its KL is in the bundle's manifest")


def load(options: dict[str, Any]) -> GenaiRunner:
    """Options: `path`, `num_threads`."""
    import onnxruntime_genai as og

    config = og.Config(options["path"])
    session_options = {"intra_op_num_threads": options["num_threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
    return GenaiRunner(og.Model(config))
