"""A long-lived process with one side of the comparison: JSON lines in, JSON lines out.

Runs in that side's own environment, so it and the side's module import nothing of Tandem but what
that environment has: `python -m bench.peers.worker bench.peers.engines.peer_genai`, started in the
repository. Requests and their replies (each of which also has `peak_memory_bytes`):

    {"op": "load", "options": {…}}                    {"versions": {…}, "load_s": …}
    {"op": "generate", "prompts": [[…]], "max_tokens": n}         {"seconds": …}
    {"op": "logits", "chats": [[[…], num_answer_tokens]], "path": "….npy"}   {"num_tokens": n}

A failure ends the process; its last words are on stderr, which the parent keeps in a log file.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import IO, Any, Protocol


class PeerModel(Protocol):
    """One loaded model. `generate` is what gets timed, so it does nothing else."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> Sequence[Sequence[int]]:
        """Return `max_tokens` greedy tokens for each of the prompts, EOS or not."""
        ...

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Any:
        """Return what predicts the last `num_rows` tokens, `(num_rows, V)` float32 numpy.

        Raises NotImplementedError where the side does not give out logits.
        """
        ...


def handle(runner: PeerModel, request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request to a loaded model."""
    if request["op"] == "generate":
        return {"seconds": timed_generate(runner, request["prompts"], request["max_tokens"])}
    if request["op"] == "logits":
        return {"num_tokens": write_logits(runner, request["chats"], request["path"])}
    raise ValueError(f"op {request['op']!r} is none of load, generate, logits")


def timed_generate(runner: PeerModel, prompts: list[list[int]], max_tokens: int) -> float:
    """Return the seconds of a run; raises RuntimeError when it did not make all of its tokens."""
    started_s = time.perf_counter()
    completions = runner.generate(prompts, max_tokens)
    seconds = time.perf_counter() - started_s
    counts = [len(completion) for completion in completions]
    if counts != [max_tokens] * len(prompts):
        raise RuntimeError(f"asked for {max_tokens} tokens each of {len(prompts)}, got {counts}")
    return seconds


def write_logits(runner: PeerModel, chats: list[tuple[list[int], int]], path: str) -> int:
    """Save the logits of all answers, one after the other, `(N, V)` float32; returns N."""
    import numpy as np

    rows = np.concatenate([runner.logits(token_ids, count) for token_ids, count in chats])
    np.save(path, rows.astype(np.float32, copy=False))
    return len(rows)


def serve(module_name: str, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until there are no more; the first one loads the model."""
    module = importlib.import_module(module_name)
    runner: PeerModel | None = None
    for line in requests:
        request = json.loads(line)
        if request["op"] == "load":
            started_s = time.perf_counter()
            runner = module.load(request["options"])
            reply = {
                "versions": {name: importlib.metadata.version(name) for name in module.PACKAGES},
                "load_s": time.perf_counter() - started_s,
            }
        else:
            assert runner is not None, "the first request loads"
            reply = handle(runner, request)
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**reply, "peak_memory_bytes": peak_kib * 1024}), file=replies, flush=True)


def die_with_parent() -> None:
    """Have the kernel kill this process, stopped or not, when its parent ends. Linux only."""
    pr_set_pdeathsig = 1
    status = ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    assert status == 0, status


def main() -> None:
    die_with_parent()
    # Libraries print to stdout, their native parts too: let that go to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)


if __name__ == "__main__":
    main()
