"""transformers' `generate`, greedy, its default attention; float32 is the reference for KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers")


class TransformersRunner:
    """See `bench.peers.worker.PeerModel`. Takes any model with transformers' `generate`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=max_tokens,
            max_new_tokens=max_tokens,
        )
        completions: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return completions

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        logits = self._model(torch.tensor([token_ids])).logits[0, -num_rows - 1 : -1]
        return logits.float().numpy()


def load(options: dict[str, Any]) -> TransformersRunner:
    """Options: `path`, `dtype`, `num_threads`."""
    from serve.models.pretrained import load_pretrained

    torch.set_num_threads(options["num_threads"])
    dtype = getattr(torch, options["dtype"])
    return TransformersRunner(load_pretrained(Path(options["path"]), dtype))
